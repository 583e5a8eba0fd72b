// This file is turns. What a packet sets off needs several goroutines: gVisor's, those of its flow, that of the exit queue. To wake one costs more
// than most have to do, above all where a thread has to be woken for it. So whoever has begun a turn says that it is awake, and does at the end what
// has come up meanwhile and is little: the flows' small tasks (crew.go), and a few packets for containers (exit.go). What is more, and what
// comes up without a turn, goes to the goroutines that are there for it.

package stack

import "github.com/rootless-ovl/rootless-ovl/internal/packet"

var _ packet.Turner = (*Gateway)(nil)

// Begin begins a turn. See packet.Turner.
func (g *Gateway) Begin() packet.Turn {
	ns := g.live.Load()
	if ns == nil {
		return nil
	}
	ns.beginTurn()
	return ns
}

// End ends a turn.
func (ns *netstack) End() { ns.endTurn() }

func (ns *netstack) beginTurn() {
	ns.exit.beginTurn()
	ns.crew.beginTurn()
}

// endTurn does the tasks first: they make packets. The caller holds no lock.
func (ns *netstack) endTurn() {
	ns.crew.endTurn()
	ns.exit.endTurn()
}
