// Tests of other names for attachments that live.

package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

func TestRename_IsSeenEverywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		one, two := newNamedNode(t, store, 1), newNamedNode(t, store, 2)
		synctest.Wait()
		one.attach(t, api.AttachRequest{PID: 11})
		two.attach(t, api.AttachRequest{PID: 21, Name: "other"})
		const mine, none = "NOERROR 10.5.1.2", "NXDOMAIN"
		for _, step := range []struct {
			ref  string
			r    api.NamesRequest
			want map[string]string
		}{
			{"11", api.NamesRequest{Name: "web", Aliases: []string{"Front"}}, map[string]string{"web": mine, "front": mine}},
			{"web", api.NamesRequest{Aliases: []string{"back"}}, map[string]string{"web": mine, "front": none, "back": mine}},
			{"web", api.NamesRequest{}, map[string]string{"web": mine, "back": none}},
			{"web", api.NamesRequest{Name: "shop"}, map[string]string{"web": none, "shop": mine}},
			{"11", api.NamesRequest{Name: "shop", Aliases: []string{"web"}}, map[string]string{"web": mine, "shop": mine}},
			{"shop", api.NamesRequest{Name: "web", Aliases: []string{"shop"}}, map[string]string{"web": mine, "shop": mine}},
			{"web", api.NamesRequest{Name: "Web"}, map[string]string{"web": mine, "shop": none}},
		} {
			a, err := one.Rename(t.Context(), step.ref, step.r)
			if err != nil {
				t.Fatalf("%+v: %v", step.r, err)
			}
			if a.Addr != "10.5.1.2/24" || a.Problem != "" || step.r.Name != "" && a.Name != step.r.Name || len(a.Aliases) != len(step.r.Aliases) {
				t.Errorf("%+v: %+v", step.r, a)
			}
			synctest.Wait()
			for name, want := range step.want {
				for i, n := range []*namedNode{one, two} {
					if got := n.says(t, []string{"10.5.1.9", "10.5.2.9"}[i], name+".ovl.internal.", mdns.TypeA); got != want {
						t.Errorf("%+v: node %d says of %s: %s, want %s", step.r, i+1, name, got, want)
					}
				}
			}
			if names := savedNames(t, one.Node); !slices.Equal(names, []string{a.Name}) {
				t.Errorf("%+v: state file: %v", step.r, names)
			}
		}
		if err := one.Detach(t.Context(), "Web", ""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := two.says(t, "10.5.2.9", "web.ovl.internal.", mdns.TypeA); got != none {
			t.Errorf("after the detach: %s", got)
		}
	})
}

func TestRename_RefusedLeavesTheNamesAsTheyWere(t *testing.T) {
	for name, tc := range map[string]struct {
		ref  string
		r    api.NamesRequest
		want error
		says string
	}{
		"taken here":                  {"web", api.NamesRequest{Name: "Near"}, api.ErrInUse, `"near"`},
		"taken there":                 {"web", api.NamesRequest{Name: "far"}, api.ErrInUse, "node 2222"},
		"alias is a name there":       {"web", api.NamesRequest{Aliases: []string{"far"}}, api.ErrInUse, "node 2222"},
		"alias is a name, other name": {"web", api.NamesRequest{Name: "front", Aliases: []string{"far"}}, api.ErrInUse, "node 2222"},
		"nobody's":                    {"web", api.NamesRequest{Name: "localhost"}, api.ErrInvalid, "localhost"},
		"no name":                     {"web", api.NamesRequest{Name: "-"}, api.ErrInvalid, "-"},
		"no attachment":               {"nobody", api.NamesRequest{Name: "x1"}, api.ErrNotFound, "nobody"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := leasetest.NewStore()
				one, two := newNamedNode(t, store, 1), newNamedNode(t, store, 2)
				synctest.Wait()
				one.attach(t, api.AttachRequest{PID: 11, Name: "web", Aliases: []string{"front"}})
				one.attach(t, api.AttachRequest{PID: 12, Name: "near"})
				two.attach(t, api.AttachRequest{PID: 21, Name: "far"})
				synctest.Wait()
				if _, err := one.Rename(t.Context(), tc.ref, tc.r); !errors.Is(err, tc.want) || !strings.Contains(strings.ToLower(err.Error()), tc.says) {
					t.Errorf("got %v, want %v with %q", err, tc.want, tc.says)
				}
				synctest.Wait()
				for _, name := range []string{"web", "front"} {
					if got := two.says(t, "10.5.2.9", name+".ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.1.2" {
						t.Errorf("%s: %s", name, got)
					}
				}
				if names := savedNames(t, one.Node); !slices.Equal(names, []string{"near", "web"}) {
					t.Errorf("state file: %v", names)
				}
				if got := two.says(t, "10.5.2.9", "far.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.2.2" {
					t.Errorf("far: %s", got)
				}
			})
		})
	}
}

func TestRename_ThatCannotBeWrittenDownIsUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := newNamedNode(t, leasetest.NewStore(), 1)
		synctest.Wait()
		one.attach(t, api.AttachRequest{PID: 11, Name: "web"})
		path := filepath.Join(one.cfg.StateDir, attachmentsFile)
		if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
			t.Fatal(err)
		}
		if _, err := one.Rename(t.Context(), "web", api.NamesRequest{Name: "shop"}); err == nil || !strings.Contains(err.Error(), attachmentsFile) {
			t.Errorf("got %v", err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for name, want := range map[string]string{"web": "NOERROR 10.5.1.2", "shop": "NXDOMAIN"} {
			if got := one.says(t, "10.5.1.9", name+".ovl.internal.", mdns.TypeA); got != want {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
		if list, _ := one.Attachments(t.Context()); len(list) != 1 || list[0].Name != "web" {
			t.Errorf("got %+v", list)
		}
	})
}

// slowStore does not answer while it is slow.
type slowStore struct {
	*leasetest.Store
	slow atomic.Bool
}

func (s *slowStore) Commit(ctx context.Context, t lease.Txn) (bool, int64, error) {
	if s.slow.Load() {
		<-ctx.Done()
		return false, 0, ctx.Err()
	}
	return s.Store.Commit(ctx, t)
}

func TestRename_WaitsForTheStoreAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &slowStore{Store: leasetest.NewStore()}
		n := newNamedNode(t, store, 1)
		synctest.Wait()
		names := []string{"a", "b", "c", "d"}
		for i, name := range names {
			n.attach(t, api.AttachRequest{PID: 11 + i, Name: name})
		}
		synctest.Wait()
		store.slow.Store(true)
		var renaming sync.WaitGroup
		for _, name := range names {
			renaming.Go(func() {
				if _, err := n.Rename(t.Context(), name, api.NamesRequest{Aliases: []string{name + "2"}}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := n.Rename(gone, "a", api.NamesRequest{Name: "x"}); !errors.Is(err, api.ErrUnavailable) || !strings.Contains(err.Error(), `"a"`) {
			t.Errorf("while another is at it: %v", err)
		}
		begun := time.Now()
		if _, err := n.Status(t.Context()); err != nil || time.Since(begun) != 0 {
			t.Errorf("status: %v after %v", err, time.Since(begun))
		}
		renaming.Wait()
		if took := time.Since(begun); took > claimPatience {
			t.Errorf("all four took %v", took)
		}
		if _, err := n.Rename(t.Context(), "a", api.NamesRequest{Name: "x"}); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		store.slow.Store(false)
	})
}

func TestRename_WhileOthersLook(t *testing.T) {
	w := newWorld()
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	w.start(1)
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Name: "a0", Publish: []string{"127.0.0.1::80"}}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 50 {
			if _, err := n.Rename(t.Context(), "1", api.NamesRequest{Name: "a" + string(rune('0'+i%10))}); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 50 {
		if list, err := n.Publish(t.Context(), "1", api.PublishRequest{Publish: []string{"127.0.0.1::81"}}); err != nil || len(list) != 1 {
			t.Errorf("%v, %v", list, err)
		}
		if _, err := n.Unpublish(t.Context(), "1", api.UnpublishRequest{All: true}); err != nil {
			t.Error(err)
		}
	}
	<-done
	if err := n.Detach(t.Context(), "1", ""); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, w, n)
}
