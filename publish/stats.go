// This file counts.

package publish

import "sync/atomic"

// Stats is what has happened on a published port since Listen.
type Stats struct {
	Connections uint64 `json:"connections,omitempty"` // TCP, accepted
	Active      uint64 `json:"active"`                // TCP connections or flows of datagrams, open now
	Spliced     uint64 `json:"spliced,omitempty"`     // connections through a socket of the container's kernel
	Carried     uint64 `json:"carried,omitempty"`     // connections through the gateway's stack
	Flows       uint64 `json:"flows,omitempty"`       // of datagrams, opened
	// BytesIn and BytesOut are payload to and from the container: of spliced connections and of datagrams. The gateway
	// counts what is carried.
	BytesIn  uint64 `json:"bytes_in"`
	BytesOut uint64 `json:"bytes_out"`
	// Drops are connections that were reset and datagrams that were dropped, by the reason.
	Drops map[string]uint64 `json:"drops,omitempty"`
}

// Reasons of Stats.Drops.
const (
	dropTooMany     = "too-many"     // the limit of connections or flows
	dropNoAddress   = "no-address"   // the container has none that the client can be brought to
	dropRefused     = "refused"      // the container refused: nobody listens there
	dropDial        = "dial-failed"  // the container could not be reached otherwise
	dropDescriptors = "descriptors"  // none was left for the next client, who waits
	dropSend        = "send-failed"  // a datagram that the gateway did not take
	dropReply       = "reply-failed" // an answer that the host's kernel did not take
)

type counters struct {
	connections, active, spliced, carried, flows, bytesIn, bytesOut atomic.Uint64

	tooMany, noAddress, refused, dial, descriptors, send, reply atomic.Uint64
}

// Stats reads the counters.
func (p *Publication) Stats() Stats {
	c := &p.count
	s := Stats{
		Connections: c.connections.Load(), Active: c.active.Load(), Spliced: c.spliced.Load(), Carried: c.carried.Load(),
		Flows: c.flows.Load(), BytesIn: c.bytesIn.Load(), BytesOut: c.bytesOut.Load(),
	}
	for reason, n := range map[string]uint64{
		dropTooMany: c.tooMany.Load(), dropNoAddress: c.noAddress.Load(), dropRefused: c.refused.Load(), dropDial: c.dial.Load(),
		dropDescriptors: c.descriptors.Load(), dropSend: c.send.Load(), dropReply: c.reply.Load(),
	} {
		if n == 0 {
			continue
		}
		if s.Drops == nil {
			s.Drops = map[string]uint64{}
		}
		s.Drops[reason] = n
	}
	return s
}
