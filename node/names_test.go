// Tests of attachments' names: what of them reaches the store and the resolver, and when.

package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
	"github.com/rootless-ovl/rootless-ovl/stack/dns"
)

// namedNode is a ready node that follows the names in store.
type namedNode struct {
	*Node
	w    *world
	stop func()
}

func newNamedNode(t *testing.T, store lease.Store, i int) *namedNode {
	t.Helper()
	w := newWorld()
	n := &namedNode{readyNode(t, w, testConfig(t), fmt.Sprintf("10.5.%d.0/24", i)), w, nil}
	n.id = strings.Repeat(fmt.Sprint(i), 32)
	n.follow(t, store)
	return n
}

// follow begins to follow store; what was followed before has to be stopped.
func (n *namedNode) follow(t *testing.T, store lease.Store) {
	t.Helper()
	r := lease.NewRegistry(store, "", nil)
	n.mu.Lock()
	n.registry = r
	n.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.followNames(ctx, r) }()
	n.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		ended <- nil
	}
	t.Cleanup(n.stop)
}

// says is what the node's resolver tells a container of a name.
func (n *namedNode) says(t *testing.T, from, name string, kind uint16) string {
	t.Helper()
	n.w.mu.Lock()
	zone := n.w.zone
	n.w.mu.Unlock()
	r := dns.New(dns.Config{ResolvConf: "/nonexistent"})
	r.SetZone(zone)
	q := new(mdns.Msg)
	q.SetQuestion(name, kind)
	b, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	who := dns.Query{From: netip.MustParseAddr(from), At: gatewayAddr(n.pool.subnet), Closed: true}
	m := new(mdns.Msg)
	if err := m.Unpack(r.Answer(t.Context(), who, b)); err != nil {
		t.Fatal(err)
	}
	out := mdns.RcodeToString[m.Rcode]
	for _, rr := range m.Answer {
		out += " " + strings.Fields(rr.String())[4]
	}
	return out
}

func (n *namedNode) attach(t *testing.T, r api.AttachRequest) api.Attachment {
	t.Helper()
	n.w.start(r.PID)
	a, err := n.Attach(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// problem is that of the attachment web.
func (n *namedNode) problem(t *testing.T) string {
	t.Helper()
	list, err := n.Attachments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if a.Name == "web" {
			return a.Problem
		}
	}
	t.Fatal("it is not attached")
	return ""
}

func TestNames_AreFoundOnEveryNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		one, two := newNamedNode(t, store, 1), newNamedNode(t, store, 2)
		synctest.Wait()
		a := one.attach(t, api.AttachRequest{PID: 11, Name: "Web", Aliases: []string{"Front"}})
		if a.Problem != "" || a.DNS == nil || a.DNS.Server != "10.5.1.1" || a.DNS.Search[0] != "ovl.internal" || a.Aliases[0] != "front" {
			t.Errorf("attached %+v", a)
		}
		one.attach(t, api.AttachRequest{PID: 12})
		two.attach(t, api.AttachRequest{PID: 21, Aliases: []string{"front"}})
		synctest.Wait()
		const client = "10.5.2.99"
		for _, n := range []*namedNode{one, two} {
			for name, want := range map[string]string{
				"web.ovl.internal.":             "NOERROR 10.5.1.2",
				"web.":                          "NOERROR 10.5.1.2",
				"pid-12.ovl.internal.":          "NXDOMAIN", // nobody gave the name
				"pid-21.22222222.ovl.internal.": "NOERROR 10.5.2.2",
				"outside.example.":              "REFUSED",
			} {
				if got := n.says(t, client, name, mdns.TypeA); got != want {
					t.Errorf("node %s says of %s %s, want %s", n.id[:1], name, got, want)
				}
			}
			if got := n.says(t, client, "front.ovl.internal.", mdns.TypeA); len(strings.Fields(got)) != 3 {
				t.Errorf("node %s says of the alias %s", n.id[:1], got)
			}
			if got := n.says(t, client, "2.1.5.10.in-addr.arpa.", mdns.TypePTR); got != "NOERROR web.ovl.internal." {
				t.Errorf("node %s says of the address %s", n.id[:1], got)
			}
		}
		if got := two.says(t, "10.5.2.2", "host.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.2.1" {
			t.Errorf("the gateway is %s", got)
		}
		if err := one.Detach(t.Context(), "Web", ""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := two.says(t, client, "web.ovl.internal.", mdns.TypeA); got != "NXDOMAIN" {
			t.Errorf("after detach: %s", got)
		}
		two.stop()
		synctest.Wait()
		if got := one.says(t, client, "front.ovl.internal.", mdns.TypeA); got != "NXDOMAIN" {
			t.Errorf("after the other node has stopped: %s", got)
		}
	})
}

func aliases(count int) (list []string) {
	for i := range count {
		list = append(list, fmt.Sprintf("a%d", i))
	}
	return list
}

func TestAttach_RefusesNamesThatAreTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		one, two := newNamedNode(t, store, 1), newNamedNode(t, store, 2)
		two.setLeases([]lease.Lease{{Attrs: lease.Attrs{PublicIP: netip.MustParseAddr("192.0.2.1"), RootlessOvl: &lease.Extension{NodeID: one.id}}}})
		synctest.Wait()
		one.attach(t, api.AttachRequest{PID: 11, Name: "web", Aliases: []string{"front"}})
		synctest.Wait()
		two.w.start(21)
		for name, r := range map[string]api.AttachRequest{
			"name":             {PID: 21, Name: "WEB"},
			"alias of a name":  {PID: 21, Name: "db", Aliases: []string{"web"}},
			"name of an alias": {PID: 21, Name: "front"},
		} {
			_, err := two.Attach(t.Context(), r)
			var coded *api.Error
			if !errors.As(err, &coded) || coded.Code != api.CodeInUse || !strings.Contains(err.Error(), "10.5.1.2 on node "+one.id+" (192.0.2.1)") {
				t.Errorf("%s: %v", name, err)
			}
		}
		nothingLeft(t, two.w, two.Node)
		one.w.start(12)
		for _, r := range []api.AttachRequest{{PID: 12, Name: "Web"}, {PID: 12, Name: "Front"}} {
			_, err := one.Attach(t.Context(), r)
			var coded *api.Error
			if !errors.As(err, &coded) || coded.Code != api.CodeInUse || !strings.Contains(err.Error(), "is taken") {
				t.Errorf("%s on the same node: %v", r.Name, err)
			}
		}
		synctest.Wait()
		for _, n := range []*namedNode{one, two} {
			if got := n.says(t, "10.5.2.9", "web.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.1.2" {
				t.Errorf("after the refusal node %s says of the one that has the name %s", n.id[:1], got)
			}
		}
		for name, r := range map[string]api.AttachRequest{
			"host":      {PID: 21, Name: "Host"},
			"gateway":   {PID: 21, Name: "db", Aliases: []string{"gateway"}},
			"no DNS":    {PID: 21, Name: "db", Aliases: []string{"a..b"}},
			"no name":   {PID: 21, Name: "a..b", Aliases: []string{"db"}},
			"localhost": {PID: 21, Name: "LocalHost"},
			"as alias":  {PID: 21, Name: "db", Aliases: []string{"localhost"}},
			"below it":  {PID: 21, Name: "x.localhost"},
			"too many":  {PID: 21, Name: "db", Aliases: aliases(api.MaxAliases + 1)},
		} {
			_, err := two.Attach(t.Context(), r)
			var coded *api.Error
			if !errors.As(err, &coded) || coded.Code != api.CodeInvalid {
				t.Errorf("%s: %v", name, err)
			}
		}
		nothingLeft(t, two.w, two.Node)
		many := two.attach(t, api.AttachRequest{PID: 22, Name: "db", Aliases: aliases(api.MaxAliases)})
		if many.Problem != "" {
			t.Errorf("as many aliases as there may be: %s", many.Problem)
		}
		synctest.Wait()
		if got := one.says(t, "10.5.1.9", "a63.ovl.internal.", mdns.TypeA); got+"/24" != "NOERROR "+many.Addr {
			t.Errorf("the last of the aliases is %s", got)
		}
		// A name that DNS cannot carry is one all the same.
		if a := two.attach(t, api.AttachRequest{PID: 21, Name: "a..b"}); !strings.Contains(a.Problem, "cannot be found by its name") {
			t.Errorf("attached %+v", a)
		}
	})
}

func TestAttach_GoesOnWhileTheStoreIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		one, two := newNamedNode(t, store, 1), newNamedNode(t, store, 2)
		synctest.Wait()
		two.attach(t, api.AttachRequest{PID: 21, Name: "db"})
		synctest.Wait()
		store.SetAway(lease.ErrUnreachable)
		time.Sleep(10 * time.Second)
		one.attach(t, api.AttachRequest{PID: 11, Name: "web"})
		one.attach(t, api.AttachRequest{PID: 12, Name: "db2"})
		if got := one.says(t, "10.5.1.9", "web.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.1.2" {
			t.Errorf("on its own node it is %s", got)
		}
		if got := one.says(t, "10.5.1.9", "db.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.2.2" {
			t.Errorf("what was seen before is %s", got)
		}
		if got := one.problem(t); !strings.Contains(got, "do not know its name yet") {
			t.Errorf("the problem is %q", got)
		}
		if err := one.Detach(t.Context(), "db2", ""); err != nil {
			t.Error(err)
		}
		// Meanwhile somebody else takes a name, with a way to the store.
		store.SetAway(nil)
		r := lease.NewRegistry(store, "", nil).NewNames("elsewhere", time.Hour)
		if err := r.Claim(t.Context(), lease.Name{Name: "web", Addr: netip.MustParseAddr("10.5.9.9")}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if got := one.problem(t); !strings.Contains(got, `"web" is taken by 10.5.9.9 on node elsewhere`) {
			t.Errorf("the problem is %q", got)
		}
		for _, n := range []*namedNode{one, two} {
			if got := n.says(t, "10.5.1.9", "web.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.9.9" {
				t.Errorf("node %s says %s", n.id[:1], got)
			}
		}
		if err := r.Drop(t.Context(), lease.Name{Name: "web", Addr: netip.MustParseAddr("10.5.9.9")}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := one.problem(t); got != "" {
			t.Errorf("the problem is %q", got)
		}
		if got := two.says(t, "10.5.1.9", "web.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.1.2" {
			t.Errorf("the other node says %s", got)
		}
		if got := two.says(t, "10.5.1.9", "db2.ovl.internal.", mdns.TypeA); got != "NXDOMAIN" {
			t.Errorf("of what was detached meanwhile the other node says %s", got)
		}
	})
}

func TestAttach_WithoutStoreYetPublishesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		w := newWorld()
		one := &namedNode{readyNode(t, w, testConfig(t), "10.5.1.0/24"), w, nil}
		one.id = strings.Repeat("1", 32)
		a := one.attach(t, api.AttachRequest{PID: 11, Name: "web"})
		if !strings.Contains(a.Problem, "do not know its name yet") {
			t.Errorf("the problem is %q", a.Problem)
		}
		one.mu.Lock()
		one.started = time.Now().Add(time.Second)
		one.mu.Unlock()
		if got := one.problem(t); !strings.Contains(got, "may not know its name") {
			t.Errorf("of one that the last daemon has attached the problem is %q", got)
		}
		two := newNamedNode(t, store, 2)
		one.follow(t, store)
		synctest.Wait()
		if got := two.says(t, "10.5.2.9", "web.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.1.2" || one.problem(t) != "" {
			t.Errorf("the other node says %s", got)
		}
	})
}

func TestAttach_ThatFailsLeavesNoName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		one := newNamedNode(t, store, 1)
		synctest.Wait()
		one.w.start(11)
		one.w.addPortErr = errKernel
		if _, err := one.Attach(t.Context(), api.AttachRequest{PID: 11, Name: "web"}); !errors.Is(err, errKernel) {
			t.Errorf("Attach: %v", err)
		}
		if pairs, _, err := store.Get(t.Context(), lease.DefaultPrefix+"/rootless-ovl/", true); err != nil || len(pairs) != 0 {
			t.Errorf("in the store: %v, %v", pairs, err)
		}
	})
}

// An earlier daemon may have let two names be that differ in case alone.
func TestNames_OfTwoThatDifferInCaseOneIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		one, two := newNamedNode(t, store, 1), newNamedNode(t, store, 2)
		synctest.Wait()
		one.attach(t, api.AttachRequest{PID: 11, Name: "web"})
		one.w.start(12)
		other := one.newAttachment(savedAttachment{Name: "Web", PID: 12, Named: true, Addr: netip.MustParsePrefix("10.5.1.9/24"), IfName: "eth0"})
		exit, err := one.edges.watchPID(12)
		if err != nil {
			t.Fatal(err)
		}
		one.mu.Lock()
		one.attachments["Web"] = other
		one.mu.Unlock()
		if err := one.enter(other, &fakeLink{c: one.w.containers[12], held: true}, exit, 1472); err != nil {
			t.Fatal(err)
		}
		one.mu.Lock()
		problem := one.describeLocked(other).Problem
		one.mu.Unlock()
		if !strings.Contains(problem, `name "web" is taken by 10.5.1.2`) {
			t.Errorf("the problem is %q", problem)
		}
		if err := one.Detach(t.Context(), "Web", ""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for _, n := range []*namedNode{one, two} {
			if got := n.says(t, "10.5.2.9", "web.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.1.2" {
				t.Errorf("node %s says %s", n.id[:1], got)
			}
		}
	})
}

func TestNames_AreInTheNetworksDomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := leasetest.NewStore()
		w := newWorld()
		one := &namedNode{readyNode(t, w, testConfig(t), "10.5.1.0/24"), w, nil}
		raw, err := lease.WithDomain(one.netConfig.Raw, "Lab.Example")
		if err != nil {
			t.Fatal(err)
		}
		if one.netConfig, err = lease.ParseConfig(raw); err != nil {
			t.Fatal(err)
		}
		one.id = strings.Repeat("1", 32)
		one.follow(t, store)
		synctest.Wait()
		a := one.attach(t, api.AttachRequest{PID: 11, Name: "web"})
		if a.DNS.Search[0] != "lab.example" {
			t.Errorf("attached %+v", a.DNS)
		}
		if got := one.says(t, "10.5.1.9", "web.lab.example.", mdns.TypeA); got != "NOERROR 10.5.1.2" {
			t.Errorf("got %s", got)
		}
		if s, err := one.Status(t.Context()); err != nil || s.Domain != "lab.example" {
			t.Errorf("status: %q, %v", s.Domain, err)
		}
	})
}
