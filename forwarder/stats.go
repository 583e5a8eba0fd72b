// This file is what the forwarder counts.

package forwarder

import (
	"net/netip"
	"sync/atomic"
)

// underlayCounters are of one direction of one queue.
type underlayCounters struct {
	calls, trains, packets, bytes atomic.Uint64
}

// UnderlayStats are counts since the start. A train is what one datagram send or receive carried: many packets of one
// size (UDP_SEGMENT, UDP_GRO) or one.
type UnderlayStats struct {
	SendCalls   uint64 `json:"send_calls"`
	SentTrains  uint64 `json:"sent_trains"`
	SentPackets uint64 `json:"sent_packets"`
	SentBytes   uint64 `json:"sent_bytes"`
	RecvCalls   uint64 `json:"recv_calls"`
	RecvTrains  uint64 `json:"recv_trains"`
	RecvPackets uint64 `json:"recv_packets"`
	RecvBytes   uint64 `json:"recv_bytes"`
	// ReceiveBuffer in bytes is what the kernel granted each socket, of which every loop has as many as there are Lanes, for
	// each of the Families: 2 with an IPv6 address, which the counts above are of as well.
	ReceiveBuffer int `json:"receive_buffer"`
	Lanes         int `json:"lanes"`
	Families      int `json:"families"`
	// GSO and GRO: the kernel cuts and joins trains (UDP_SEGMENT, UDP_GRO).
	GSO bool `json:"gso"`
	GRO bool `json:"gro"`
	// Loops is the number of poll loops; Steered: the kernel gives each the packets of its own containers.
	Loops   int  `json:"loops"`
	Steered bool `json:"steered"`
}

// PeerStats are counts of inner packets and their bytes since the peer's configuration last changed.
type PeerStats struct {
	SentPackets uint64 `json:"sent_packets"`
	SentBytes   uint64 `json:"sent_bytes"`
	RecvPackets uint64 `json:"recv_packets"`
	RecvBytes   uint64 `json:"recv_bytes"`
}

// Stats are the counters of a Router.
type Stats struct {
	Underlay UnderlayStats
	// ICMPErrors sent.
	ICMPErrors uint64
	// Drops in packets, by reason; every reason is there.
	Drops map[string]uint64
	// Peers by underlay address; a dual-stack node is one of each family.
	Peers map[netip.AddrPort]PeerStats
}

// Stats returns the counters.
func (r *Router) Stats() Stats {
	s := Stats{Drops: make(map[string]uint64), Peers: make(map[netip.AddrPort]PeerStats)}
	under := r.under.Load()
	s.Underlay.ReceiveBuffer, s.Underlay.Lanes, s.Underlay.GSO, s.Underlay.GRO = under[outer4].recvBuffer, under[outer4].lanes, true, true
	for _, f := range under {
		if f != nil {
			s.Underlay.GSO, s.Underlay.GRO = s.Underlay.GSO && f.gso, s.Underlay.GRO && f.gro
			s.Underlay.Families++
		}
	}
	s.Underlay.Loops, s.Underlay.Steered = len(r.loops), r.Steers()
	r.mu.Lock()
	workers := r.workers
	r.mu.Unlock()
	for _, w := range workers {
		s.Underlay.SendCalls += w.sent.calls.Load()
		s.Underlay.SentTrains += w.sent.trains.Load()
		s.Underlay.SentPackets += w.sent.packets.Load()
		s.Underlay.SentBytes += w.sent.bytes.Load()
		s.ICMPErrors += w.icmps.Load()
		for d := dropNone + 1; d < numDrops; d++ {
			s.Drops[dropNames[d]] += w.drops[d].Load()
		}
	}
	for _, l := range r.loops {
		s.Underlay.RecvCalls += l.rxq.stats.calls.Load()
		s.Underlay.RecvTrains += l.rxq.stats.trains.Load()
		s.Underlay.RecvPackets += l.rxq.stats.packets.Load()
		s.Underlay.RecvBytes += l.rxq.stats.bytes.Load()
	}
	for _, p := range r.table.Load().peers {
		ps := s.Peers[p.cfg.Addr]
		ps.SentPackets += p.sentPackets.Load()
		ps.SentBytes += p.sentBytes.Load()
		ps.RecvPackets += p.recvPackets.Load()
		ps.RecvBytes += p.recvBytes.Load()
		s.Peers[p.cfg.Addr] = ps
	}
	return s
}
