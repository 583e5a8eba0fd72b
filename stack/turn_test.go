// This file tests turns without a gateway around them.

package stack

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// noted is a task that counts.
type noted struct{ n *atomic.Int32 }

func (t noted) do() { t.n.Add(1) }

func TestCrew_DoesAtTheEndOfATurnWhatCameUpInIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c crew
		var n atomic.Int32
		c.beginTurn()
		c.soon(noted{&n})
		c.soon(noted{&n})
		synctest.Wait()
		if n.Load() != 0 {
			t.Error("done before the end of the turn")
		}
		c.endTurn()
		if n.Load() != 2 {
			t.Errorf("%d tasks done at the end of the turn, want 2", n.Load())
		}
		c.soon(noted{&n})
		synctest.Wait()
		if n.Load() != 3 {
			t.Errorf("%d tasks done, want 3: the last came up without a turn", n.Load())
		}
		c.close()
	})
}

func TestCrew_TakesWhatIsTooMuchForATurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c crew
		var n atomic.Int32
		c.beginTurn()
		const many = 3 * turnTasks
		for range many {
			c.soon(noted{&n})
		}
		c.endTurn()
		synctest.Wait()
		if n.Load() != many {
			t.Errorf("%d tasks done, want %d", n.Load(), many)
		}
		c.close()
	})
}
