// This file tells whether all endpoints of a client are one store. A list that names two of them would have each request answered by the next
// of the two: leases would be held in both, expire in both and never be seen together.

package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// membership is which store is asked. The zero value with all set is ready.
type membership struct {
	all []string // constant: the endpoints given

	// mu is held across the look at all endpoints, so that answers of both stores cause one look.
	mu       sync.Mutex
	id       uint64 // of the cluster that is asked; 0: none has answered yet
	rev      int64  // the latest that has been answered
	narrowed bool   // not all are asked
	mixed    bool   // they have been found to be of several stores
	sure     bool   // at the last look all have answered, and nothing has failed since
	looked   time.Time
	unsure   time.Time     // since when
	chosen   chan struct{} // closed when others are asked than before: gRPC lets streams live on at endpoints that were taken away
}

// How often the endpoints are looked at while it is not known of all which store they are; of several stores, while another than the first is in
// use, it is the former.
const (
	lookAgain  = 3 * time.Second
	lookSeldom = time.Minute
)

// floor is the revision that answers to requests from now on have at least, of those that are linearizable.
func (m *membership) floor() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rev
}

// otherStoreError says that an answer may not be of the store that is asked. What was asked for may have been done there.
type otherStoreError struct {
	others []string // endpoints that are left out now
	first  string   // endpoint that decides
}

func (e *otherStoreError) Error() string {
	return fmt.Sprintf("the endpoints are not of one store: %s is another than %s, which is used: give the endpoints of one store with --etcd-endpoints", strings.Join(e.others, ","), e.first)
}

// errMoved ends a watch at a store that is not asked any more.
var errMoved = &otherStoreError{[]string{"the store that was watched"}, "the one of the first endpoint"}

// sameStore looks at who answered. Where it is another cluster than before, or one that is not as far as floor, all endpoints are asked: if
// they are one store it has been made anew or restored, and nothing is wrong; if not, the store of the first endpoint that answers is used, and
// those of others are left out until it is away. So nodes that have the same list come together in one store. An error tells that the answer
// does not count.
func (c *Client) sameStore(ctx context.Context, h *pb.ResponseHeader, floor int64) error {
	m, id := &c.members, h.GetClusterId()
	if len(m.all) < 2 || id == 0 {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if (m.id == id || m.id == 0) && h.Revision >= min(floor, m.rev) {
		m.id, m.rev = id, max(m.rev, h.Revision)
		return nil
	}
	m.id, m.rev = id, h.Revision
	if err := c.chooseLocked(ctx); err != nil || m.id == id {
		return err
	}
	return &otherStoreError{[]string{"an endpoint"}, c.etcd.Endpoints()[0]} // that was left out before it had answered
}

// chooseLocked asks all endpoints who they are, leaves out those of other stores than that of the first that answers, and returns an error if it did
// not before: then an answer may have been of one of them.
func (c *Client) chooseLocked(ctx context.Context) error {
	m := &c.members
	m.looked = time.Now()
	of, ids := c.stores(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	m.sure = !slices.Contains(ids, 0)
	first := slices.IndexFunc(ids, func(id uint64) bool { return id != 0 })
	if first < 0 {
		return nil // nobody contradicts
	}
	var ours, others []string
	for i, e := range m.all {
		if ids[i] == 0 || of[i] == of[first] { // one that is away may be either
			ours = append(ours, e)
		} else {
			others = append(others, e)
		}
	}
	m.id, m.narrowed = ids[first], len(others) > 0
	m.mixed = m.mixed || m.narrowed
	if slices.Equal(ours, c.etcd.Endpoints()) {
		return nil
	}
	c.etcd.SetEndpoints(ours...)
	close(m.chosen)
	m.chosen = make(chan struct{})
	if !m.narrowed {
		return nil
	}
	m.rev = 0
	return &otherStoreError{others, m.all[first]}
}

// lookAround looks, until ctx ends, who the endpoints are that were not looked at, and whether the store that decides has come back while another
// is in use: no request may be made for long. It calls moved when others are asked from now on.
func (c *Client) lookAround(ctx context.Context, moved func()) {
	if len(c.members.all) < 2 {
		return
	}
	c.members.mu.Lock()
	chosen := c.members.chosen
	c.members.mu.Unlock()
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-chosen:
			moved()
			return
		case <-ctx.Done():
			return
		}
		m := &c.members
		m.mu.Lock()
		if m.unsure.IsZero() {
			m.unsure = time.Now()
		}
		every := lookAgain / 2 // of several watches one looks
		if !m.mixed {
			every = max(every, min(lookSeldom, time.Since(m.unsure)/2))
		}
		if (m.mixed || !m.sure) && !m.narrowed && time.Since(m.looked) > every {
			_ = c.chooseLocked(ctx) // nobody waits for an answer
		}
		m.mu.Unlock()
	}
}

// stores asks every endpoint who it is: ids are the clusters, 0 where there is no answer, and of two endpoints with the same number in of none has
// shown that they are different stores. Clusters that were made with the same settings, such as a distribution's, have the same id and
// members of the same id; but one member does not go back from one look to the next.
func (c *Client) stores(ctx context.Context) (of []int, ids []uint64) {
	first, second := c.look(ctx), c.look(ctx)
	n := len(c.members.all)
	of, ids = make([]int, n), make([]uint64, n)
	same := func(i, j int) bool {
		a, b := first[i], first[j]
		if a.Header.ClusterId != b.Header.ClusterId {
			return false
		}
		return a.Header.MemberId != b.Header.MemberId || a.RaftIndex <= second[j].RaftIndex && b.RaftIndex <= second[i].RaftIndex
	}
	for i := range n {
		of[i] = i
		if first[i] == nil || second[i] == nil {
			continue
		}
		ids[i] = first[i].Header.ClusterId
		for j := range i {
			if ids[j] != 0 && same(i, j) {
				of[i] = of[j]
				break
			}
		}
	}
	return of, ids
}

// look is the status of every endpoint, nil where there is no answer.
func (c *Client) look(ctx context.Context) []*clientv3.StatusResponse {
	ctx, cancel := context.WithTimeout(ctx, c.timeout/2)
	defer cancel()
	all := make([]*clientv3.StatusResponse, len(c.members.all))
	var wg sync.WaitGroup
	for i, e := range c.members.all {
		wg.Go(func() {
			if s, err := c.etcd.Status(ctx, e); err == nil && s.Header != nil {
				all[i] = s
			}
		})
	}
	wg.Wait()
	return all
}

// answers tells whether the store that is asked is there, with a leader, though a request of it has failed: one may have come to its deadline
// otherwise. It is not away either when ctx ends.
func (c *Client) answers(ctx context.Context) bool {
	op, cancel := context.WithTimeout(ctx, c.timeout/2)
	defer cancel()
	var there atomic.Bool
	var wg sync.WaitGroup
	for _, e := range c.etcd.Endpoints() {
		wg.Go(func() {
			if s, err := c.etcd.Status(op, e); err == nil && s.Leader != 0 {
				there.Store(true)
				cancel()
			}
		})
	}
	wg.Wait()
	return there.Load() || ctx.Err() != nil
}

// failed is classify. When the store is away, all endpoints are asked again: of the ones that were left out any is better than none. An etcd lease
// that is not there may be in another store: errors do not tell whose they are.
func (c *Client) failed(ctx context.Context, doing string, err error) error {
	m := &c.members
	err = classify(ctx, c.name, doing, err)
	if err == nil || len(m.all) < 2 {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var other *otherStoreError
	switch {
	case errors.Is(err, ErrLeaseExpired):
		if mixed := c.chooseLocked(ctx); mixed != nil {
			return classify(ctx, c.name, doing, mixed)
		}
	case errors.Is(err, ErrUnreachable) && !errors.As(err, &other):
		if m.sure {
			m.sure, m.unsure = false, time.Now()
		}
		if m.narrowed && !c.answers(ctx) {
			m.narrowed = false
			c.etcd.SetEndpoints(m.all...)
		}
	}
	return err
}
