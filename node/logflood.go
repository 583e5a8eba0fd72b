// This file keeps others from filling the host's log: whoever writes to the store decides how many keys are no leases, how many peers come and
// go, and how many names are doubted.

package node

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Of lines that say the same - the message, whatever its attributes - so many are logged in such a time. Then one tells that there are more.
const (
	sameLines = 100
	sameFor   = time.Minute
)

// sparing is a slog.Handler that leaves out the lines of a flood. Those with the same message count together.
type sparing struct {
	slog.Handler
	told *toldLines // shared by all handlers made of this one
}

type toldLines struct {
	mu    sync.Mutex
	lines map[string]*told
}

type told struct {
	since   time.Time
	lines   int
	leftOut int
}

// spare makes a logger that leaves out the lines of a flood.
func spare(log *slog.Logger) *slog.Logger {
	return slog.New(sparing{log.Handler(), &toldLines{lines: make(map[string]*told)}})
}

// Handle implements slog.Handler.
func (s sparing) Handle(ctx context.Context, r slog.Record) error {
	s.told.mu.Lock()
	t := s.told.lines[r.Message]
	if t == nil {
		t = &told{since: r.Time}
		s.told.lines[r.Message] = t
	}
	leftOut := 0
	if r.Time.Sub(t.since) >= sameFor {
		leftOut = t.leftOut
		*t = told{since: r.Time}
	}
	t.lines++
	n := t.lines
	if n > sameLines {
		t.leftOut++
	}
	s.told.mu.Unlock()
	switch {
	case n == sameLines+1:
		more := slog.NewRecord(r.Time, r.Level, r.Message+": and more like this, which are left out for a minute", 0)
		return s.Handler.Handle(ctx, more)
	case n > sameLines:
		return nil
	case leftOut > 1: // one had the line above
		r.AddAttrs(slog.Int("left_out_before", leftOut))
	}
	return s.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (s sparing) WithAttrs(attrs []slog.Attr) slog.Handler {
	return sparing{s.Handler.WithAttrs(attrs), s.told}
}

// WithGroup implements slog.Handler.
func (s sparing) WithGroup(name string) slog.Handler {
	return sparing{s.Handler.WithGroup(name), s.told}
}
