// This file is what the gateway counts: gauges of what it holds, totals, and drops by reason.

package stack

import (
	"sync/atomic"

	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

// Stats is a snapshot of the gateway's counters. "In" is from containers to the gateway, "Out" from it to containers.
type Stats struct {
	TCPFlows    uint64 `json:"tcp_flows"`     // connections now
	TCPHalfOpen uint64 `json:"tcp_half_open"` // of connections: being dialled or in the handshake now
	UDPFlows    uint64 `json:"udp_flows"`     // now
	EchoFlows   uint64 `json:"echo_flows"`    // now
	ExitQueue   uint64 `json:"exit_queue"`    // packets waiting now

	TCPOpened      uint64 `json:"tcp_opened"`      // connections completed
	TCPRefused     uint64 `json:"tcp_refused"`     // answered with RST because the host's peer refused
	TCPUnreachable uint64 `json:"tcp_unreachable"` // answered with an ICMP error
	TimeWaitReused uint64 `json:"time_wait_reused"`
	UDPOpened      uint64 `json:"udp_opened"`
	EchoOpened     uint64 `json:"echo_opened"`
	TCPInward      uint64 `json:"tcp_inward"` // connections that began outside, of published ports and host processes
	UDPInward      uint64 `json:"udp_inward"` // likewise flows of datagrams
	ICMPErrorsOut  uint64 `json:"icmp_errors_out"`

	// Fragments came in so many, which gVisor puts together: at most 4 MiB of them for each IP version, for 30 s, the oldest make room. Those of
	// Drops "bad-fragment" overlap, contradict each other or end before they should.
	Fragments uint64 `json:"fragments"`

	PacketsIn  uint64 `json:"packets_in"` // superpackets count as one
	BytesIn    uint64 `json:"bytes_in"`
	PacketsOut uint64 `json:"packets_out"`
	BytesOut   uint64 `json:"bytes_out"`

	Drops map[string]uint64 `json:"drops"` // by reason; reasons that never occurred are left out
	DNS   dns.Stats         `json:"dns"`
}

// dropReason says why a packet ended here. Its name is the key in Stats.Drops.
type dropReason uint8

const (
	dropNotRunning dropReason = iota
	dropMalformed
	dropChecksum
	dropFragment
	dropNeighbour
	dropClosed
	dropDenied
	dropEgress
	dropMulticast
	dropProtocol
	dropICMPType
	dropICMPForged
	dropICMPUnused
	dropTCPFlows
	dropTCPHalfOpen
	dropEvicted
	dropUDPFlows
	dropEchoFlows
	dropContainerShare
	dropNoSocket
	dropHostBusy
	dropEchoForbidden
	dropICMPRate
	dropExitQueue
	dropReasons
)

var dropNames = [dropReasons]string{
	dropNotRunning:     "not-running",
	dropMalformed:      "malformed",
	dropChecksum:       "bad-checksum",
	dropFragment:       "bad-fragment",
	dropNeighbour:      "neighbour-message",
	dropClosed:         "closed-destination",
	dropDenied:         "denied-destination",
	dropEgress:         "egress-denied",
	dropMulticast:      "multicast",
	dropProtocol:       "unknown-protocol",
	dropICMPType:       "icmp-type",
	dropICMPForged:     "icmp-error-forged",
	dropICMPUnused:     "icmp-error-unused",
	dropTCPFlows:       "tcp-flow-limit",
	dropTCPHalfOpen:    "tcp-half-open-limit",
	dropEvicted:        "tcp-half-open-evicted",
	dropUDPFlows:       "udp-flow-limit",
	dropEchoFlows:      "echo-flow-limit",
	dropContainerShare: "container-share",
	dropNoSocket:       "no-host-socket",
	dropHostBusy:       "host-socket-full",
	dropEchoForbidden:  "echo-forbidden",
	dropICMPRate:       "icmp-error-rate",
	dropExitQueue:      "exit-queue-full",
}

// counters are Gateway's totals. All are atomic.
type counters struct {
	tcpOpened, tcpRefused, tcpUnreachable, timeWaitReused atomic.Uint64
	udpOpened, echoOpened, icmpErrorsOut                  atomic.Uint64
	tcpInward, udpInward                                  atomic.Uint64
	packetsIn, bytesIn, packetsOut, bytesOut, fragments   atomic.Uint64
	drops                                                 [dropReasons]atomic.Uint64
}

func (c *counters) drop(r dropReason) { c.drops[r].Add(1) }

func (c *counters) snapshot() Stats {
	s := Stats{
		TCPOpened:      c.tcpOpened.Load(),
		TCPRefused:     c.tcpRefused.Load(),
		TCPUnreachable: c.tcpUnreachable.Load(),
		TimeWaitReused: c.timeWaitReused.Load(),
		UDPOpened:      c.udpOpened.Load(),
		EchoOpened:     c.echoOpened.Load(),
		TCPInward:      c.tcpInward.Load(),
		UDPInward:      c.udpInward.Load(),
		ICMPErrorsOut:  c.icmpErrorsOut.Load(),
		PacketsIn:      c.packetsIn.Load(),
		BytesIn:        c.bytesIn.Load(),
		PacketsOut:     c.packetsOut.Load(),
		BytesOut:       c.bytesOut.Load(),
		Fragments:      c.fragments.Load(),
		Drops:          make(map[string]uint64),
	}
	for r := range c.drops {
		if n := c.drops[r].Load(); n > 0 {
			s.Drops[dropNames[r]] = n
		}
	}
	return s
}
