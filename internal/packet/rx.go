// This file is the receive memory of a poll loop: packets of one batch, laid end to end so that small ones stay in few
// cache lines and a superpacket has all the room it needs.

package packet

// Rx holds the packets that one goroutine read and has not yet sent on. Not safe for concurrent use.
type Rx struct {
	arena []byte
	used  int // arena bytes taken by pkts
	pkts  []Packet
}

// rxSpace is what one read may fill: headroom and the largest IP packet.
const rxSpace = Headroom + MaxIP

// NewRx allocates room for at most packets packets and for `bytes` bytes of them, plus one of any size. A batch ends at
// whichever bound comes first: packets for small datagrams, bytes for superpackets, which must not outgrow the cache.
func NewRx(packets, bytes int) *Rx {
	return &Rx{arena: make([]byte, bytes+rxSpace), pkts: make([]Packet, 0, packets)}
}

// Reset forgets all packets; their memory is used again.
func (r *Rx) Reset() { r.used, r.pkts = 0, r.pkts[:0] }

// Space returns the memory for the next packet, whose IP header must be placed at Headroom, or nil when the batch is full.
func (r *Rx) Space() []byte {
	if len(r.pkts) == cap(r.pkts) || len(r.arena)-r.used < rxSpace {
		return nil
	}
	return r.arena[r.used : r.used+rxSpace : r.used+rxSpace]
}

// Add takes the n bytes at Headroom of the last Space into the batch and returns them as a packet with nothing owed.
func (r *Rx) Add(n int) *Packet {
	end := r.used + Headroom + n
	r.pkts = append(r.pkts, Packet{Buf: r.arena[r.used:end:end], Off: Headroom})
	r.used = (end + Headroom - 1) &^ (Headroom - 1)
	return &r.pkts[len(r.pkts)-1]
}

// Drop takes the last packet added out of the batch again.
func (r *Rx) Drop() {
	last := &r.pkts[len(r.pkts)-1]
	r.used -= (len(last.Buf) + Headroom - 1) &^ (Headroom - 1)
	r.pkts = r.pkts[:len(r.pkts)-1]
}

// Packets are the packets of the batch, in the order of arrival. They are valid until Reset.
func (r *Rx) Packets() []Packet { return r.pkts }
