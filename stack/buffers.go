// This file lends copy buffers to flows, only while they have something to copy.

package stack

import (
	"sync"
	"sync/atomic"
)

// Sizes in bytes. A flow that copies takes a large buffer while less than largeBudget is lent out, so that thousands of flows whose
// receivers do not read cannot take all memory; beyond that it takes a small one.
const (
	largeBuffer = 256 << 10
	smallBuffer = 16 << 10
	largeBudget = 64 << 20
)

var (
	largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	largeLent    atomic.Int64
)

// copyBuffer is a borrowed buffer; the zero value is none.
type copyBuffer struct {
	large *[largeBuffer]byte
	small *[smallBuffer]byte
}

func borrowBuffer() copyBuffer {
	if largeLent.Add(largeBuffer) <= largeBudget {
		return copyBuffer{large: largeBuffers.Get().(*[largeBuffer]byte)}
	}
	largeLent.Add(-largeBuffer)
	return copyBuffer{small: smallBuffers.Get().(*[smallBuffer]byte)}
}

func (b copyBuffer) bytes() []byte {
	if b.large != nil {
		return b.large[:]
	}
	return b.small[:]
}

// giveBack returns the buffer to its pool and leaves none.
func (b *copyBuffer) giveBack() {
	switch {
	case b.large != nil:
		largeBuffers.Put(b.large)
		largeLent.Add(-largeBuffer)
	case b.small != nil:
		smallBuffers.Put(b.small)
	}
	*b = copyBuffer{}
}
