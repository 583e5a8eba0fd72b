// This file keeps the network config in the store. A store that was made anew has none, and the next node that starts would make up another
// network; the nodes that run know the one that there was.

package lease

import (
	"context"
	"errors"
	"time"
)

// KeepConfig puts raw, the config that this node runs with, into the store whenever there is none, until ctx ends; then it returns nil. Whoever is
// first does so, and none overwrites what there is: found is called, on this goroutine, with every config that is or gets there, in the order of
// its writing. While the store is away it keeps trying. raw must parse.
func (r *Registry) KeepConfig(ctx context.Context, raw []byte, found func(raw []byte)) error {
	if _, err := ParseConfig(raw); err != nil {
		return err
	}
	var pause backoff
	var last int64 // ModRevision of what found was told
	var put time.Time
	refused := false
	for ctx.Err() == nil {
		pairs, rev, err := r.store.Get(ctx, r.configKey(), false)
		r.health.report("config", err)
		started := time.Now()
		switch {
		case err != nil:
			pause.wait(ctx, r.health.answered())
			continue
		case len(pairs) > 0:
			if at := pairs[0].ModRevision; at != last {
				last = at
				found(pairs[0].Value)
			}
		default:
			var created bool
			created, err = r.CreateConfig(ctx, raw)
			switch {
			case created && time.Since(put) > calm:
				r.log.Warn("the store had no network config any more; put back the one that this node runs with", "key", r.configKey())
				fallthrough
			case created:
				put = time.Now()
			case errors.Is(err, ErrAuth) && !refused:
				refused = true
				r.log.Warn("the store has no network config any more, and does not let this node put it back: `rootless-ovl config set` writes one", "key", r.configKey(), "err", err)
			}
			if err == nil {
				pause.wait(ctx, nil) // whoever deletes it may do so again
				continue
			}
		}
		r.untilChanged(ctx, rev)
		if time.Since(started) > maxBackoff {
			pause.reset()
		}
		pause.wait(ctx, nil)
	}
	return nil
}

// untilChanged returns when the config has changed since rev, or may have, and with ctx.
func (r *Registry) untilChanged(ctx context.Context, rev int64) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	<-r.store.Watch(ctx, r.configKey(), false, rev+1)
}
