// Tests of what of an attachment's policy reaches the router and the gateway, and when.

package node

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/forwarder"
	"github.com/rootless-ovl/rootless-ovl/internal/packet"
	"github.com/rootless-ovl/rootless-ovl/stack"
)

func TestContainerPolicy_ClosesWhatTheListsAreFor(t *testing.T) {
	prefix := netip.MustParsePrefix
	web := forwarder.Rule{Prefix: prefix("10.5.9.0/24"), Proto: packet.TCP, First: 80, Last: 90}
	all6 := forwarder.Rule{Prefix: prefix("fd00::/16")}
	for name, c := range map[string]struct {
		p    api.Policy
		want *forwarder.Policy
	}{
		"nothing": {api.Policy{Egress: []string{"deny"}, HostAccess: []int{80}}, nil},
		"isolate": {api.Policy{Isolate: true}, &forwarder.Policy{In: forwarder.Direction{Closed: true}, Out: forwarder.Direction{Closed: true}}},
		"from":    {api.Policy{AllowFrom: []string{"10.5.9.0/24:80-90/tcp"}}, &forwarder.Policy{In: forwarder.Direction{Closed: true, Allow: []forwarder.Rule{web}}}},
		"to":      {api.Policy{AllowTo: []string{"fd00::/16"}}, &forwarder.Policy{Out: forwarder.Direction{Closed: true, Allow: []forwarder.Rule{all6}}}},
		"isolate but for some": {api.Policy{Isolate: true, AllowFrom: []string{"10.5.9.0/24:80-90/tcp"}},
			&forwarder.Policy{In: forwarder.Direction{Closed: true, Allow: []forwarder.Rule{web}}, Out: forwarder.Direction{Closed: true}}},
	} {
		got, err := containerPolicy(c.p)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, c.want)
		}
	}
}

func TestAttach_HoldsTheContainerToItsPolicy(t *testing.T) {
	w := newWorld()
	w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	p := api.Policy{Isolate: true, AllowFrom: []string{"10.5.9.0/24:80/tcp"}, Egress: []string{"192.0.2.0/24"}, HostAccess: []int{5432}}
	holds := func(when string) {
		t.Helper()
		addr := netip.MustParseAddr("10.5.72.2")
		if got, want := w.policies[addr], (stack.Policy{Egress: &stack.Egress{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}, HostPorts: []uint16{5432}}); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: the gateway has %+v, want %+v", when, got, want)
		}
		if len(w.ports) != 1 {
			t.Fatalf("%s: %d ports", when, len(w.ports))
		}
		for _, c := range w.ports {
			if c.Policy == nil || !c.Policy.In.Closed || !c.Policy.Out.Closed || len(c.Policy.In.Allow) != 1 || len(c.Policy.Out.Allow) != 0 {
				t.Errorf("%s: the router has %+v", when, c.Policy)
			}
		}
	}
	got, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Name: "web", Policy: p})
	if err != nil || !reflect.DeepEqual(got.Policy, p) {
		t.Fatalf("attached as %+v, %v", got, err)
	}
	holds("attached")

	// The next daemon holds it to the same.
	stopNode(n)
	clear(w.policies)
	again := readyNode(t, w, n.cfg, "10.5.72.0/24")
	if err := again.adopt(); err != nil {
		t.Fatal(err)
	}
	holds("taken up again")
	if list, err := again.Attachments(context.Background()); err != nil || len(list) != 1 || !reflect.DeepEqual(list[0].Policy, p) {
		t.Errorf("attachments %+v, %v", list, err)
	}
	if err := again.Detach(t.Context(), "web", ""); err != nil {
		t.Fatal(err)
	}
	if len(w.policies) != 0 {
		t.Errorf("after the detach the gateway has %+v", w.policies)
	}
	nothingLeft(t, w, again)
}

func TestAttach_LeavesNoPolicyBehindWhenItFails(t *testing.T) {
	w := newWorld()
	w.start(77)
	w.addPortErr = errKernel
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Policy: api.Policy{Egress: []string{"deny"}}}); err == nil {
		t.Fatal("no error")
	}
	if len(w.policies) != 0 {
		t.Errorf("the gateway has %+v", w.policies)
	}
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Policy: api.Policy{Egress: []string{"none"}}}); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a policy that means nothing: %v", err)
	}
	nothingLeft(t, w, n)
}

// A container is not taken up with less than it was attached with.
func TestAdopt_RefusesAPolicyThatMeansNothing(t *testing.T) {
	w := newWorld()
	w.start(77)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/24")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 77, Policy: api.Policy{Isolate: true}}); err != nil {
		t.Fatal(err)
	}
	stopNode(n)
	path := filepath.Join(n.cfg.StateDir, attachmentsFile)
	var s savedAttachments
	if _, err := readState(path, &s); err != nil {
		t.Fatal(err)
	}
	s.Attachments[0].AllowTo = []string{"everybody"}
	if err := writeState(path, s); err != nil {
		t.Fatal(err)
	}
	again := readyNode(t, w, n.cfg, "10.5.72.0/24")
	if err := again.adopt(); err != nil {
		t.Fatal(err)
	}
	if list, _ := again.Attachments(context.Background()); len(list) != 0 {
		t.Errorf("attachments %+v", list)
	}
}
