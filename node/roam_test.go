// Tests of following the host to other addresses, on a made-up host and a store in memory; and of a whole run, on loopback.

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

const udpConfig = `{"Network":"10.5.0.0/16","Backend":{"Type":"udp"}}`

// traveller is a node on a host whose addresses a test changes.
type traveller struct {
	*Node
	t      *testing.T
	w      *world
	store  *silentStore
	logged syncBuffer
	read   int // of logged
	stop   context.CancelFunc
	ended  sync.WaitGroup
	looks  int
}

// silentStore gives no answer while it is silent.
type silentStore struct {
	*leasetest.Store
	silent atomic.Bool
}

func (s *silentStore) Get(ctx context.Context, key string, prefix bool) ([]lease.Pair, int64, error) {
	if s.silent.Load() {
		<-ctx.Done()
		return nil, 0, ctx.Err()
	}
	return s.Store.Get(ctx, key, prefix)
}

var (
	home     = external{ifName: "eth0", bind: netip.MustParseAddr("192.0.2.1"), public: netip.MustParseAddr("192.0.2.1"), mtu: 1500}
	away     = external{ifName: "eth0", bind: netip.MustParseAddr("198.51.100.7"), public: netip.MustParseAddr("198.51.100.7"), mtu: 1500}
	third    = external{ifName: "wlan0", bind: netip.MustParseAddr("203.0.113.3"), public: netip.MustParseAddr("203.0.113.3"), mtu: 1500}
	farPeer  = ovlLease("10.5.2.0/24", "192.0.2.12", "bb", 8285, 1472)
	farRoute = netip.MustParseAddr("10.5.2.7")
)

// travel runs body in a bubble, with a node that holds a lease and follows its host.
func travel(t *testing.T, config string, change func(*Config, *external), body func(*testing.T, *traveller)) {
	t.Helper()
	c, host := testConfig(t), home
	synctest.Test(t, func(t *testing.T) {
		if change != nil {
			change(&c, &host)
		}
		r := &traveller{t: t, w: newWorld(), store: &silentStore{Store: leasetest.NewStore()}}
		c.Log = slog.New(slog.NewTextHandler(&r.logged, nil))
		r.Node = readyNode(t, r.w, c, "10.5.72.0/24")
		cfg, err := lease.ParseConfig([]byte(config))
		if err != nil {
			t.Fatal(err)
		}
		r.netConfig, r.external, r.id, r.port, r.vxlan = cfg, host, "aa", 8285, nil
		if carriesIPv6(cfg) {
			r.vxlan = &forwarder.VXLAN{VNI: 1, MAC: [6]byte{2, 0, 0, 0, 0, 1}}
		}
		r.w.host = host
		look := r.edges.external
		r.edges.external = func(c Config, now external) (external, error) {
			r.looks++
			return look(c, now)
		}
		r.registry = lease.NewRegistry(r.store, "", r.log)
		r.acquire(t)
		ctx, cancel := context.WithCancel(t.Context())
		r.stop = cancel
		r.ended.Go(func() {
			if err := (&roamer{n: r.Node, store: &openedStore{}}).run(ctx); err != nil {
				t.Error(err)
			}
		})
		r.ended.Go(func() { _ = r.held.Run(ctx) })
		synctest.Wait()
		body(t, r)
		cancel()
		r.ended.Wait()
	})
}

// acquire takes a lease, and has the node know it and a peer.
func (r *traveller) acquire(t *testing.T) {
	t.Helper()
	held, err := r.registry.Acquire(t.Context(), r.netConfig, r.request(subnets{v4: netip.MustParsePrefix("10.5.72.0/24")}))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.leased(held, subnetsOf(held.Lease())); err != nil {
		t.Fatal(err)
	}
	r.setLeases([]lease.Lease{farPeer})
}

// moves has the host change, and waits until the node has done what there is to do.
func (r *traveller) moves(change func(*world)) {
	r.w.mu.Lock()
	change(r.w)
	news := r.w.hostNews
	r.w.mu.Unlock()
	news()
	time.Sleep(2 * settleMost)
	synctest.Wait()
}

func (r *traveller) to(e external) { r.moves(func(w *world) { w.host, w.hostErr = e, nil }) }

// stored is what the store has of the node's lease.
func (r *traveller) stored() (lease.Attrs, int64) {
	r.t.Helper()
	pairs, _, err := r.store.Get(r.t.Context(), DefaultEtcdPrefix+"/subnets/10.5.72.0-24", true)
	if err != nil || len(pairs) != 1 {
		r.t.Fatalf("%v, %v", pairs, err)
	}
	a, err := lease.ParseAttrs(pairs[0].Value)
	if err != nil {
		r.t.Fatal(err)
	}
	return a, pairs[0].ModRevision
}

func (r *traveller) status() api.Status {
	r.t.Helper()
	s, err := r.Status(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// wants fails the test unless everything says that the host is at e, and the lease at published.
func (r *traveller) wants(e external, published netip.Addr) {
	r.t.Helper()
	r.w.mu.Lock()
	bound := r.w.bound[0]
	r.w.mu.Unlock()
	if bound != e.bind {
		r.t.Errorf("the underlay is bound to %v, want %v", bound, e.bind)
	}
	if s := r.status(); s.PublicIP != e.public.String() || s.Subnet != "10.5.72.0/24" || s.State != api.StateReady {
		r.t.Errorf("status %+v", s)
	}
	if a, _ := r.stored(); a.PublicIP != published || a.RootlessOvl == nil || a.RootlessOvl.NodeID != "aa" {
		r.t.Errorf("the lease has %v, want %v", a.PublicIP, published)
	}
}

// logs fails the test unless these are the lines that were logged since the last call, as level and message, in any order.
func (r *traveller) logs(want ...string) {
	r.t.Helper()
	text := r.logged.String()[r.read:]
	r.read += len(text)
	var got []string
	for line := range strings.Lines(text) {
		level, rest, _ := strings.Cut(line[strings.Index(line, "level=")+len("level="):], " msg=")
		msg, _, quoted := strings.Cut(strings.TrimPrefix(rest, `"`), `"`)
		if !quoted || !strings.HasPrefix(rest, `"`) {
			msg, _, _ = strings.Cut(rest, " ")
		}
		got = append(got, level+" "+msg)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		r.t.Errorf("logged\n\t%s\nwant\n\t%s\n%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"), text)
	}
}

const (
	saysChanged = "INFO the external address has changed"
	saysLease   = "INFO the lease has the new address"
	saysGone    = "WARN " + addressGone
	saysBack    = "INFO the external address is back"
	saysForeign = "ERROR " + notPublished
	saysAway    = "WARN " + storeAway
	saysStaying = "WARN " + staying
	saysNext    = "ERROR " + foreignNext
	saysOutage  = "WARN the store is away; keeping what is known and trying again"
	saysStore   = "INFO the store is back"
)

// anotherAt gives a stock node with that address a lease, until it leaves.
func (r *traveller) anotherAt(public netip.Addr) (leave func()) {
	r.t.Helper()
	id, err := r.store.Grant(r.t.Context(), 24*time.Hour)
	if err != nil {
		r.t.Fatal(err)
	}
	const theirs = DefaultEtcdPrefix + "/subnets/10.5.9.0-24"
	value := fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null}`, public)
	commit := func(x lease.Txn) {
		r.t.Helper()
		if ok, _, err := r.store.Commit(r.t.Context(), x); !ok || err != nil {
			r.t.Fatalf("%v, %v", ok, err)
		}
	}
	commit(lease.Txn{Key: theirs, Value: []byte(value), Lease: id})
	return func() { commit(lease.Txn{Key: theirs, Delete: true}) }
}

// atHome has everything say that the node is where it was, and forgets what was logged.
func (r *traveller) atHome() {
	r.w.mu.Lock()
	r.w.bound[0] = home.bind
	r.w.mu.Unlock()
	r.logs("INFO leased a subnet", "INFO peers")
}

// later is when the node has tried again.
func (r *traveller) later() {
	time.Sleep(2 * roamRetry)
	synctest.Wait()
}

func TestRoam_FollowsAnotherAddressInPlace(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.logs("INFO leased a subnet", "INFO peers")
		a, before := r.stored()
		r.to(away)
		r.wants(away, away.public)
		now, rev := r.stored()
		if rev == before || now.RootlessOvl.Port != a.RootlessOvl.Port || now.RootlessOvl.MTU != a.RootlessOvl.MTU {
			t.Errorf("the lease became %+v at %d, was %+v at %d", now, rev, a, before)
		}
		r.logs(saysChanged, saysLease)
		for range 3 { // what is over is not done again
			r.to(away)
		}
		time.Sleep(time.Hour)
		if _, again := r.stored(); again != rev {
			t.Error("the lease was written again")
		}
		r.logs()
		r.to(home)
		r.wants(home, home.public)
		r.logs(saysChanged, saysLease)
	})
}

func TestRoam_LooksOnceAtManyMessages(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		before := r.looks
		for range 100 { // ten seconds of storm, and the change in the midst of it
			r.w.mu.Lock()
			r.w.host = away
			news := r.w.hostNews
			r.w.mu.Unlock()
			news()
			time.Sleep(settleFor / 2)
		}
		time.Sleep(2 * settleMost)
		synctest.Wait()
		if looks := r.looks - before; looks < 2 || looks > 15 {
			t.Errorf("%d looks at the host", looks)
		}
		r.wants(away, away.public)
	})
}

func TestRoam_WaitsForAnAddress(t *testing.T) {
	for _, tt := range []struct {
		name string
		then external
		says []string
	}{
		{"the same comes back", home, []string{saysBack}},
		{"another comes", away, []string{saysChanged, saysLease}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
				r.w.bound[0] = home.bind
				r.logs("INFO leased a subnet", "INFO peers")
				_, before := r.stored()
				for i := range 3 { // the texts differ; it is one event
					r.moves(func(w *world) { w.hostErr = fmt.Errorf("no default route, %d interfaces", i) })
				}
				time.Sleep(10 * time.Minute)
				r.logs(saysGone)
				if s := r.status(); !strings.Contains(s.Problem, "no default route") || s.State != api.StateReady || s.PublicIP != home.public.String() {
					t.Errorf("status %+v", s)
				}
				if got := lookup(t, r.w.table, farRoute.String()); got != forwarder.ToPeer(forwarder.PeerConfig{Addr: wirePeer, MTU: 1472}) {
					t.Errorf("the peer's route is %+v", got)
				}
				if _, now := r.stored(); now != before {
					t.Error("the lease was written")
				}
				r.to(tt.then)
				r.wants(tt.then, tt.then.public)
				r.logs(tt.says...)
				if s := r.status(); s.Problem != "" {
					t.Errorf("problem %q", s.Problem)
				}
			})
		})
	}
}

func TestRoam_PublishesWhenTheStoreIsBack(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.store.SetAway(lease.ErrUnreachable)
		synctest.Wait()
		r.to(away)
		time.Sleep(time.Minute)
		r.to(home)
		r.to(away)
		time.Sleep(time.Minute)
		r.logs("INFO leased a subnet", "INFO peers", saysOutage,
			saysChanged, saysAway, saysChanged, saysChanged)
		if s := r.status(); s.PublicIP != away.public.String() || !strings.Contains(s.Problem, "store") {
			t.Errorf("status %+v", s)
		}
		r.store.SetAway(nil)
		time.Sleep(2 * roamRetry)
		synctest.Wait()
		r.wants(away, away.public)
		r.logs(saysStore, saysLease)
		if s := r.status(); s.Problem != "" {
			t.Errorf("problem %q", s.Problem)
		}
	})
}

func TestRoam_DoesNotFightForAnAddress(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.logs("INFO leased a subnet", "INFO peers")
		leave := r.anotherAt(away.public)
		_, before := r.stored()
		r.to(away)
		time.Sleep(10 * time.Minute)
		r.wants(away, home.public)
		if _, now := r.stored(); now != before {
			t.Error("the lease was written")
		}
		r.logs(saysChanged, saysForeign)
		if s := r.status(); !strings.Contains(s.Problem, "10.5.9.0/24") || !strings.Contains(s.Problem, "flannel node at 198.51.100.7") {
			t.Errorf("problem %q", s.Problem)
		}
		leave()
		time.Sleep(2 * roamRetry)
		synctest.Wait()
		r.wants(away, away.public)
		r.logs(saysLease)
		if s := r.status(); s.Problem != "" {
			t.Errorf("problem %q", s.Problem)
		}
	})
}

// A lease with the new address, which nobody could look for while the store was away, is looked for before anything is written.
func TestRoam_DoesNotPublishUnseenWhenTheStoreIsBack(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.atHome()
		leave := r.anotherAt(away.public)
		_, before := r.stored()
		r.store.SetAway(lease.ErrUnreachable)
		synctest.Wait()
		r.to(away)
		time.Sleep(time.Minute)
		r.logs(saysOutage, saysChanged, saysAway)
		r.store.SetAway(nil)
		for range 1000 {
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
			if _, now := r.stored(); now != before {
				t.Fatal("the lease was written")
			}
		}
		time.Sleep(time.Hour)
		r.wants(away, home.public)
		r.logs(saysStore, saysForeign)
		if s := r.status(); !strings.Contains(s.Problem, "flannel node at 198.51.100.7") {
			t.Errorf("problem %q", s.Problem)
		}
		leave()
		r.later()
		r.wants(away, away.public)
		r.logs(saysLease)
	})
}

// Peers send to the old address, and take what comes from it, until the lease has another.
func TestRoam_StaysWhereItCanBeReachedUntilTheStoreAnswers(t *testing.T) {
	stay := func(w *world) { w.host, w.also = away, []netip.Addr{home.bind} }
	outage := func(t *testing.T, r *traveller) {
		r.atHome()
		r.store.SetAway(lease.ErrUnreachable)
		synctest.Wait()
		r.moves(stay)
		time.Sleep(time.Minute)
		r.logs(saysOutage, saysStaying)
		r.w.mu.Lock()
		bound := r.w.bound[0]
		r.w.mu.Unlock()
		if s := r.status(); s.PublicIP != home.public.String() || !strings.Contains(s.Problem, "one before is still there") || bound != home.bind {
			t.Errorf("bound to %v, status %+v", bound, s)
		}
	}
	back := func(t *testing.T, r *traveller) {
		t.Helper()
		r.store.SetAway(nil)
		r.later()
		if s := r.status(); s.Problem != "" {
			t.Errorf("problem %q", s.Problem)
		}
	}
	t.Run("it is back", func(t *testing.T) {
		travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
			outage(t, r)
			back(t, r)
			r.wants(away, away.public)
			r.logs(saysStore, saysChanged, saysLease)
		})
	})
	t.Run("the old address goes first", func(t *testing.T) {
		travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
			outage(t, r)
			r.moves(func(w *world) { w.also = nil })
			if s := r.status(); s.PublicIP != away.public.String() {
				t.Errorf("status %+v", s)
			}
			r.logs(saysChanged, saysAway)
			back(t, r)
			r.wants(away, away.public)
			r.logs(saysStore, saysLease)
		})
	})
	t.Run("the route goes back first", func(t *testing.T) {
		travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
			_, before := r.stored()
			outage(t, r)
			r.to(home)
			r.logs(saysBack)
			back(t, r)
			r.wants(home, home.public)
			r.logs(saysStore)
			if _, now := r.stored(); now != before {
				t.Error("the lease was written")
			}
		})
	})
	t.Run("nothing to publish", func(t *testing.T) {
		public := netip.MustParseAddr("203.0.113.9")
		given := func(e external) external {
			e.public = public
			return e
		}
		travel(t, udpConfig, func(c *Config, host *external) { c.PublicIP, *host = public, given(*host) }, func(t *testing.T, r *traveller) {
			r.atHome()
			r.store.SetAway(lease.ErrUnreachable)
			synctest.Wait()
			r.moves(func(w *world) { w.host, w.also = given(away), []netip.Addr{home.bind} })
			r.logs(saysOutage, saysChanged)
			back(t, r)
			r.wants(given(away), public)
		})
	})
	t.Run("another node has it", func(t *testing.T) {
		travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
			r.atHome()
			leave := r.anotherAt(away.public)
			r.moves(stay)
			time.Sleep(10 * time.Minute)
			r.wants(home, home.public)
			r.logs(saysNext)
			if s := r.status(); !strings.Contains(s.Problem, "10.5.9.0/24") {
				t.Errorf("problem %q", s.Problem)
			}
			leave()
			r.later()
			r.wants(away, away.public)
			r.logs(saysChanged, saysLease)
		})
	})
	t.Run("it cannot be bound", func(t *testing.T) {
		travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
			r.atHome()
			_, before := r.stored()
			r.moves(func(w *world) {
				stay(w)
				w.rebindErr = errKernel
			})
			time.Sleep(time.Minute)
			r.wants(home, home.public)
			if _, now := r.stored(); now != before {
				t.Error("the lease was written")
			}
			r.logs("ERROR " + notBound)
		})
	})
}

// A store that is silent holds up nothing but what is to be written there.
func TestRoam_FollowsWhileTheStoreIsSilent(t *testing.T) {
	for _, stays := range []bool{false, true} {
		travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
			r.atHome()
			r.store.silent.Store(true)
			for _, e := range []external{away, third, home, third, away, third} { // within twelve seconds
				r.moves(func(w *world) {
					w.host, w.also = e, nil
					if stays {
						w.also = []netip.Addr{home.bind}
					}
				})
				want := e
				if stays {
					want = home
				}
				if s := r.status(); s.PublicIP != want.public.String() {
					t.Errorf("the old address stays: %v. At %v, the node says %s", stays, e.bind, s.PublicIP)
				}
			}
			time.Sleep(time.Hour)
			r.store.silent.Store(false)
			r.moves(func(w *world) { w.host = away })
			r.moves(func(w *world) { w.host = third })
			r.wants(third, third.public)
			time.Sleep(24 * time.Hour)
			r.wants(third, third.public)
			if s := r.status(); s.Problem != "" {
				t.Errorf("problem %q", s.Problem)
			}
		})
	}
}

func TestRoam_EndsOnTheLastOfManyAddresses(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		for i := range 60 {
			r.w.mu.Lock()
			r.w.host = []external{home, away, third}[i%3]
			if i%5 == 0 {
				r.store.SetAway([]error{lease.ErrUnreachable, nil}[i/5%2])
			}
			news := r.w.hostNews
			r.w.mu.Unlock()
			news()
			time.Sleep(time.Duration(i) * 20 * time.Millisecond) // sooner than it is settled, and later
		}
		r.store.SetAway(nil)
		r.later()
		r.wants(third, third.public)
	})
}

func TestRoam_KeepsAGivenPublicIP(t *testing.T) {
	public := netip.MustParseAddr("203.0.113.9")
	given := func(e external) external {
		e.public = public
		return e
	}
	travel(t, udpConfig, func(c *Config, host *external) { c.PublicIP, *host = public, given(*host) }, func(t *testing.T, r *traveller) {
		r.logs("INFO leased a subnet", "INFO peers")
		_, before := r.stored()
		r.to(given(away))
		r.wants(given(away), public)
		if _, now := r.stored(); now != before {
			t.Error("the lease was written")
		}
		r.logs(saysChanged)
	})
}

func TestRoam_TriesAgainWhereTheUnderlayCannotFollow(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.w.bound[0] = home.bind
		r.logs("INFO leased a subnet", "INFO peers")
		r.moves(func(w *world) { w.host, w.rebindErr = away, errKernel })
		time.Sleep(time.Minute)
		r.wants(home, home.public)
		if s := r.status(); !strings.Contains(s.Problem, errKernel.Error()) {
			t.Errorf("problem %q", s.Problem)
		}
		r.logs("ERROR " + notBound)
		r.w.mu.Lock()
		r.w.rebindErr = nil
		r.w.mu.Unlock()
		time.Sleep(2 * roamRetry)
		synctest.Wait()
		r.wants(away, away.public)
		r.logs(saysChanged, saysLease)
	})
}

func TestRoam_IsQuietWhenTheHostIsBackBeforeTheUnderlayFollowed(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.w.bound[0] = home.bind
		r.moves(func(w *world) { w.host, w.rebindErr = away, errKernel })
		r.to(home)
		r.wants(home, home.public)
		r.logs("INFO leased a subnet", "INFO peers", "ERROR "+notBound, saysBack)
		if s := r.status(); s.Problem != "" {
			t.Errorf("problem %q", s.Problem)
		}
	})
}

// An alloc network sends nothing between hosts: the lease follows, and an IPv6 address need not be there.
func TestRoam_AllocPublishesAndBindsNothing(t *testing.T) {
	const config = `{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00:5::/48","Backend":{"Type":"alloc"}}`
	travel(t, config, nil, func(t *testing.T, r *traveller) {
		if s := r.status(); s.Problem != "" {
			t.Errorf("problem %q", s.Problem)
		}
		r.to(away)
		r.wants(external{bind: netip.Addr{}, public: away.public}, away.public)
		r.logs("INFO leased a subnet", saysChanged, saysLease)
	})
}

func TestRoam_WarnsOfAnotherMTU(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.logs("INFO leased a subnet", "INFO peers")
		r.w.bound[0] = home.bind
		_, before := r.stored()
		narrow := home
		narrow.mtu = 1400
		r.to(narrow)
		r.wants(narrow, narrow.public)
		r.logs("WARN the external interface has another MTU: containers and the lease keep theirs until the node is started again, and what paths carry is probed anew")
		if _, now := r.stored(); now != before || r.status().MTU != 1472 {
			t.Errorf("the overlay's MTU is %d", r.status().MTU)
		}
	})
}

func TestRoam_SearchesPathsAnew(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.prober.mu.Lock()
		old := r.prober.paths[wirePeer]
		old.mtu, old.searched, old.confirmed = 1372, time.Now(), time.Now()
		r.prober.mu.Unlock()
		r.to(away)
		r.prober.mu.Lock()
		defer r.prober.mu.Unlock()
		path := r.prober.paths[wirePeer]
		if path == old || !path.searched.IsZero() || path.mtu != 1372 {
			t.Errorf("path %+v", path)
		}
		select {
		case <-old.gone:
		default:
			t.Error("a search of the old path goes on")
		}
		if got := lookup(t, r.w.table, farRoute.String()); got != forwarder.ToPeer(forwarder.PeerConfig{Addr: wirePeer, MTU: 1372}) {
			t.Errorf("the peer's route is %+v", got)
		}
	})
}

// What a peer's lease says of an address is judged by where we are now.
func TestRoam_RebuildsTheRouteTable(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		there := farPeer
		there.Attrs.PublicIP = away.public // and our port: that of a node that is gone
		r.setLeases([]lease.Lease{there})
		if got := lookup(t, r.w.table, farRoute.String()); got == forwarder.UnreachableNet {
			t.Error("the peer cannot be reached from home")
		}
		r.to(away)
		if got := lookup(t, r.w.table, farRoute.String()); got != forwarder.UnreachableNet {
			t.Errorf("packets for a peer with our own address: %+v", got)
		}
	})
}

func TestRoam_PublishesForALeaseThatIsTakenMeanwhile(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		held := r.held
		r.mu.Lock()
		r.held = nil // lost, and another is being acquired, with the address of home
		r.mu.Unlock()
		r.to(away)
		if a, _ := r.stored(); a.PublicIP != home.public {
			t.Errorf("the lease has %v", a.PublicIP)
		}
		if err := r.leased(held, subnetsOf(held.Lease())); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.wants(away, away.public)
	})
}

func TestRoam_LooksNowAndThenWhereTheKernelDoesNotTell(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		w := newWorld()
		w.watchErr = errKernel
		ctx, cancel := context.WithCancel(t.Context())
		var watch sync.WaitGroup
		told := 0
		n := &Node{log: r.log, edges: w.edges()}
		watch.Go(func() { (&roamer{n: n}).watch(ctx, func() { told++ }) })
		time.Sleep(10*roamRetry + 1)
		cancel()
		watch.Wait()
		if told != 10 {
			t.Errorf("looked %d times", told)
		}
		r.logs("INFO leased a subnet", "INFO peers", "WARN changes of this host's network are not told; looking for them now and then")
	})
}

func TestRoam_FollowsEitherFamilyOfADualStackHost(t *testing.T) {
	with6 := func(e external, bind6 string) external {
		if bind6 != "" {
			e.bind6 = netip.MustParseAddr(bind6)
		}
		e.public6 = e.bind6
		return e
	}
	bound6 := func(r *traveller) netip.Addr {
		r.w.mu.Lock()
		defer r.w.mu.Unlock()
		return r.w.bound[1]
	}
	const gone6 = "WARN " + address6Gone
	travel(t, dualStackConfig, func(_ *Config, host *external) { *host = with6(*host, "2001:db8::1") }, func(t *testing.T, r *traveller) {
		first := netip.MustParseAddr("2001:db8::1")
		r.to(with6(away, "")) // to a network without IPv6
		time.Sleep(time.Minute)
		r.wants(away, away.public)
		if a, _ := r.stored(); a.PublicIPv6 != first || bound6(r) != first {
			t.Errorf("published %v, bound to %v", a.PublicIPv6, bound6(r))
		}
		if s := r.status(); !strings.Contains(s.Problem, "IPv6") {
			t.Errorf("problem %q", s.Problem)
		}
		r.logs("INFO leased a subnet", "WARN peer cannot be used", "INFO peers", saysChanged, saysLease, gone6)
		second := netip.MustParseAddr("2001:db8:7::7")
		r.to(with6(away, second.String()))
		r.wants(away, away.public)
		if a, _ := r.stored(); a.PublicIPv6 != second || bound6(r) != second {
			t.Errorf("published %v, bound to %v", a.PublicIPv6, bound6(r))
		}
		if s := r.status(); s.Problem != "" || s.PublicIPv6 != second.String() {
			t.Errorf("status %+v", s)
		}
		r.logs(saysChanged, saysLease)
		r.to(with6(away, ""))
		r.to(with6(away, second.String()))
		r.logs(gone6, saysBack)
	})
}

func TestRoam_IPv6IsNoMatterInANetworkOfIPv4(t *testing.T) {
	travel(t, udpConfig, nil, func(t *testing.T, r *traveller) {
		r.logs("INFO leased a subnet", "INFO peers")
		r.w.bound[0] = home.bind
		_, before := r.stored()
		e := home
		e.bind6 = netip.MustParseAddr("2001:db8::1")
		e.public6 = e.bind6
		r.to(e)
		r.to(home)
		r.wants(home, home.public)
		if _, now := r.stored(); now != before {
			t.Error("the lease was written")
		}
		r.logs()
	})
}

// The whole of it, with a real underlay and a real embedded store: loopback has room to move.
func TestRun_FollowsTheHostToAnotherAddress(t *testing.T) {
	c := testConfig(t)
	c.ListenEtcd = "0.0.0.0:0"
	n, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld()
	n.edges = w.edges()
	r := runNode(t, n)
	s := r.ready()
	endpoint := s.Store.Endpoints[0]
	before := leasesIn(t, endpoint)
	if len(before) != 1 || !strings.HasPrefix(endpoint, "http://127.0.0.1:") {
		t.Fatalf("%s has leases %+v", endpoint, before)
	}
	there := netip.MustParseAddr("127.0.0.2")
	var news func()
	r.until("watching its host", func(api.Status) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		news = w.hostNews
		return news != nil
	})
	w.mu.Lock()
	w.host = external{ifName: "lo", bind: there, public: there, mtu: 1500}
	w.mu.Unlock()
	news()
	now := r.until("at another address", func(s api.Status) bool {
		return s.PublicIP == there.String() && strings.HasPrefix(s.Store.Endpoints[0], "http://127.0.0.2:")
	})
	if now.Subnet != s.Subnet || now.Port != s.Port || now.Problem != "" {
		t.Errorf("status %+v, before %+v", now, s)
	}
	r.until("published", func(api.Status) bool {
		l := leasesIn(t, now.Store.Endpoints[0])
		return len(l) == 1 && l[0].Subnet == before[0].Subnet && l[0].Attrs.PublicIP == there
	})
	if got := n.router.Underlay(); got != netip.AddrPortFrom(there, uint16(s.Port)) {
		t.Errorf("the underlay is bound to %v", got)
	}
	if err := r.end(); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
