// This file is whether the store answers: the state that status shows, and the two log lines of an outage.

package lease

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Health is whether the store answers.
type Health struct {
	Connected bool
	Since     time.Time // of the last change; before the first answer, of NewRegistry
	Err       error     // why not Connected; nil before the first attempt
}

type health struct {
	log   *slog.Logger // constant
	store string       // constant

	mu      sync.Mutex
	now     Health
	failing map[string]error // by source: "request", "lease", "watch"
	known   bool             // there was an answer or a failure
	away    bool             // the store is, and the log tells or would have told
	silent  bool             // the log says nothing of its coming and going
	told    []time.Time      // when the log has told lately that the store is away
	answer  chan struct{}    // closed at the next answer after a failure
}

// What the log says of a store that comes and goes, at most: so many outages within so long, and that there are more.
const (
	toldOutages = 3
	toldWithin  = 10 * time.Minute
)

func (h *health) init(log *slog.Logger, store string) {
	h.log, h.store, h.failing, h.now.Since = log, store, make(map[string]error), time.Now()
	h.answer = make(chan struct{})
}

// answered is closed when the store answers anybody after it has failed somebody.
func (h *health) answered() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answer
}

// report notes how source's last attempt went. The store counts as away while any source fails, so that a source that
// succeeds (say, a request) does not hide one that does not (say, the watch). A caller's own context, and answers about
// data, are no news of the store.
func (h *health) report(source string, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrLeaseExpired) || errors.Is(err, ErrCompacted) || errors.Is(err, ErrRewound) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.failing[source] = err
	} else {
		if len(h.failing) > 0 {
			close(h.answer)
			h.answer = make(chan struct{})
		}
		delete(h.failing, source)
	}
	// A one-shot request that failed is answered for by any later success.
	if err == nil && source != "request" {
		delete(h.failing, "request")
	}

	connected := len(h.failing) == 0
	was, known := h.now, h.known
	h.known = true
	if !known || was.Connected != connected {
		h.now = Health{connected, time.Now(), err}
	} else if err != nil {
		h.now.Err = err
	}
	// Wrong certificates and passwords at the very first request are no outage: its caller has the error and may well end.
	fatal := !known && source == "request" && (errors.Is(err, ErrTLS) || errors.Is(err, ErrAuth))
	switch {
	case !connected && !h.away && !fatal:
		h.away = true
		h.sayAway(err)
	case connected && h.away:
		h.away = false
		if !h.silent {
			h.log.Info("the store is back", "store", h.store, "away", h.now.Since.Sub(was.Since).Round(time.Millisecond))
		}
	}
}

// sayAway logs an outage. One that is slow, or whose connections break, would fill the log.
func (h *health) sayAway(err error) {
	now := time.Now()
	h.told = slices.DeleteFunc(h.told, func(t time.Time) bool { return now.Sub(t) > toldWithin })
	switch {
	case len(h.told) < toldOutages:
		h.silent = false
		h.told = append(h.told, now)
		h.log.Warn("the store is away; keeping what is known and trying again", "store", h.store, "err", err)
	case !h.silent:
		h.silent = true
		h.log.Warn("the store comes and goes; keeping what is known, and saying no more of it for now: status tells how it is", "store", h.store, "err", err)
	}
}

// Health says whether the store answers, as of the last attempt of Watch, Held or a request.
func (r *Registry) Health() Health {
	r.health.mu.Lock()
	defer r.health.mu.Unlock()
	return r.health.now
}
