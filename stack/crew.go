// This file is the goroutines that work for the TCP flows. A flow has none of its own: whoever hears of something to do gives it to the crew.
// What takes next to no time is done by a goroutine that is awake anyhow, at the end of its turn (turn.go): to wake another one costs more.

package stack

import (
	"slices"
	"sync"
)

// crewIdle is how many goroutines wait for work at most. They are kept for their stacks, which have grown to what gVisor needs: to begin
// with a new one costs as much as a small segment does.
const crewIdle = 64

// turnTasks is how many tasks are done at the end of a turn.
const turnTasks = 64

// task is something that a goroutine of the crew does. It waits for nothing for long, but for the opening of a connection.
type task interface{ do() }

// crew is a number of goroutines that grows with what there is to do at once.
type crew struct {
	wg sync.WaitGroup

	mu     sync.Mutex
	idle   []chan task // one for each goroutine that waits; the last came last, and its stack is the warmest
	closed bool
	turns  int    // turns that have not ended
	due    []task // that the next of them to end does
}

// soon has t, which takes next to no time, done at the end of a turn, or given if there is none.
func (c *crew) soon(t task) {
	c.mu.Lock()
	if c.turns > 0 {
		c.due = append(c.due, t)
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	c.give(t)
}

func (c *crew) beginTurn() {
	c.mu.Lock()
	c.turns++
	c.mu.Unlock()
}

// endTurn does what is due. What is more than a turn's worth is given to the crew: whoever lends its goroutine has other things to do.
func (c *crew) endTurn() {
	c.mu.Lock()
	for done := 0; len(c.due) > 0; done++ {
		t := c.due[0]
		c.due = slices.Delete(c.due, 0, 1)
		c.mu.Unlock()
		if done < turnTasks {
			t.do()
		} else {
			c.give(t)
		}
		c.mu.Lock()
	}
	c.turns--
	c.mu.Unlock()
}

// give has t done soon. It does not wait.
func (c *crew) give(t task) {
	c.mu.Lock()
	if n := len(c.idle); n > 0 {
		next := c.idle[n-1]
		c.idle = c.idle[:n-1]
		c.mu.Unlock()
		next <- t
		return
	}
	c.mu.Unlock()
	c.wg.Add(1)
	go c.work(t)
}

func (c *crew) work(t task) {
	defer c.wg.Done()
	next := make(chan task, 1)
	for {
		t.do()
		c.mu.Lock()
		if c.closed || len(c.idle) == crewIdle {
			c.mu.Unlock()
			return
		}
		c.idle = append(c.idle, next)
		c.mu.Unlock()
		if t = <-next; t == nil {
			return
		}
	}
}

// close lets the goroutines go that have nothing to do, and waits for the others. Nothing is given any more.
func (c *crew) close() {
	c.mu.Lock()
	c.closed = true
	for _, next := range c.idle {
		close(next)
	}
	c.idle = nil
	c.mu.Unlock()
	c.wg.Wait()
}
