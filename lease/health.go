// This file is whether the store answers: the state that status shows, and the two log lines of an outage.

package lease

import (
	"context"
	"errors"
	"log/slog"
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
	said    bool             // the log tells that the store is away
}

func (h *health) init(log *slog.Logger, store string) {
	h.log, h.store, h.failing, h.now.Since = log, store, make(map[string]error), time.Now()
}

// report notes how source's last attempt went. The store counts as away while any source fails, so that a source that
// succeeds (say, a request) does not hide one that does not (say, the watch). A caller's own context, and answers about
// data, are no news of the store.
func (h *health) report(source string, err error) {
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrLeaseExpired) || errors.Is(err, ErrCompacted) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.failing[source] = err
	} else {
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
	case !connected && !h.said && !fatal:
		h.said = true
		h.log.Warn("the store is away; keeping what is known and trying again", "store", h.store, "err", err)
	case connected && h.said:
		h.said = false
		h.log.Info("the store is back", "store", h.store, "away", h.now.Since.Sub(was.Since).Round(time.Millisecond))
	}
}

// Health says whether the store answers, as of the last attempt of Watch, Held or a request.
func (r *Registry) Health() Health {
	r.health.mu.Lock()
	defer r.health.mu.Unlock()
	return r.health.now
}
