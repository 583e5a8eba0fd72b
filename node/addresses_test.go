// Tests of reserved addresses.

package node

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// reservedAddrs are the reserved addresses as the API shows them, each with its owner and attachment.
func reservedAddrs(t *testing.T, n *Node) map[string]string {
	t.Helper()
	list, err := n.Addresses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]string)
	for _, a := range list {
		m[a.Addr] = a.Owner + " " + a.Attachment
	}
	return m
}

func reserveAddr(t *testing.T, n *Node, addr, owner string) api.Address {
	t.Helper()
	a, err := n.ReserveAddress(t.Context(), api.AddressRequest{Addr: addr, Owner: owner})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestReserveAddress_KeepsItForWhoNamesIt(t *testing.T) {
	w := newWorld()
	w.start(1)
	w.start(2)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/29") // .2 to .6
	first := reserveAddr(t, n, "", "docker/1")
	if first.Addr != "10.5.72.2/29" || first.Gateway != "10.5.72.1" || first.Owner != "docker/1" || first.Attachment != "" {
		t.Errorf("reserved %+v", first)
	}
	if got := reserveAddr(t, n, "10.5.72.4", "docker/2"); got.Addr != "10.5.72.4/29" {
		t.Errorf("reserved %+v", got)
	}
	for i, want := range []string{"10.5.72.3/29", "10.5.72.5/29"} { // those that are reserved are passed over
		got, err := n.Attach(t.Context(), api.AttachRequest{PID: i + 1})
		if err != nil || got.Addr != want {
			t.Fatalf("attached %+v, %v; want %s", got, err, want)
		}
	}
	if got := reserveAddr(t, n, "10.5.72.4", "docker/2"); got.Addr != "10.5.72.4/29" {
		t.Errorf("reserved again: %+v", got)
	}
	if err := n.Detach(t.Context(), "1", ""); err != nil {
		t.Fatal(err)
	}
	got, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Name: "web", Addr: "10.5.72.4"})
	if err != nil || got.Addr != "10.5.72.4/29" {
		t.Fatalf("attached %+v, %v", got, err)
	}
	if r := reservedAddrs(t, n); r["10.5.72.4/29"] != "docker/2 web" || r["10.5.72.2/29"] != "docker/1 " || len(r) != 2 {
		t.Errorf("reserved: %v", r)
	}
	if err := n.Detach(t.Context(), "web", ""); err != nil {
		t.Fatal(err)
	}
	if r := reservedAddrs(t, n); r["10.5.72.4/29"] != "docker/2 " {
		t.Errorf("after the detach: %v", r)
	}
	if err := n.ReleaseAddress(t.Context(), "10.5.72.4"); err != nil {
		t.Fatal(err)
	}
	if r := reservedAddrs(t, n); len(r) != 1 {
		t.Errorf("after the release: %v", r)
	}
	w.checkOrder(t)
}

func TestReserveAddress_Refuses(t *testing.T) {
	w := newWorld()
	w.start(1)
	n := readyNode(t, w, testConfig(t), "10.5.72.0/29")
	if _, err := n.Attach(t.Context(), api.AttachRequest{PID: 1, Addr: "10.5.72.3"}); err != nil {
		t.Fatal(err)
	}
	reserveAddr(t, n, "10.5.72.4", "docker/1")
	reserveAddr(t, n, "10.5.72.5", "")
	for _, tc := range []struct {
		name, addr, owner string
		want              error
	}{
		{"an attachment's", "10.5.72.3", "docker/1", api.ErrInUse},
		{"another's", "10.5.72.4", "docker/2", api.ErrInUse},
		{"nobody's", "10.5.72.5", "", api.ErrInUse},
		{"the gateway", "10.5.72.1", "", api.ErrInvalid},
		{"the network", "10.5.72.0", "", api.ErrInvalid},
		{"the broadcast address", "10.5.72.7", "", api.ErrInvalid},
		{"outside", "10.5.73.3", "", api.ErrInvalid},
		{"no address", "x", "", api.ErrInvalid},
	} {
		if _, err := n.ReserveAddress(t.Context(), api.AddressRequest{Addr: tc.addr, Owner: tc.owner}); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	reserveAddr(t, n, "", "")
	reserveAddr(t, n, "", "")
	if _, err := n.ReserveAddress(t.Context(), api.AddressRequest{}); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("of a full subnet: %v", err)
	}
	for addr, want := range map[string]error{"10.5.72.3": api.ErrNotFound, "x": api.ErrInvalid} {
		if err := n.ReleaseAddress(t.Context(), addr); !errors.Is(err, want) {
			t.Errorf("release %s: %v, want %v", addr, err, want)
		}
	}
	n.open = false
	if _, err := n.ReserveAddress(t.Context(), api.AddressRequest{}); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("of a node that is not ready: %v", err)
	}
	if _, err := n.Addresses(t.Context()); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("the list of a node that is not ready: %v", err)
	}
	if err := n.ReleaseAddress(t.Context(), "10.5.72.4"); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("release, of a node that is not ready: %v", err)
	}
}

func TestReserveAddress_OutlivesTheDaemon(t *testing.T) {
	w := newWorld()
	c := testConfig(t)
	n := readyNode(t, w, c, "10.5.72.0/24")
	reserveAddr(t, n, "10.5.72.9", "docker/1")
	stopNode(n)

	n = readyNode(t, w, c, "10.5.72.0/24")
	if err := n.adopt(); err != nil {
		t.Fatal(err)
	}
	if r := reservedAddrs(t, n); r["10.5.72.9/24"] != "docker/1 " || len(r) != 1 {
		t.Errorf("reserved: %v", r)
	}
	stopNode(n)
	n = readyNode(t, w, c, "10.5.80.0/24") // the subnet is another one by now: it is of no use, and still the engine's to release
	if err := n.adopt(); err != nil {
		t.Fatal(err)
	}
	if err := n.ReleaseAddress(t.Context(), "10.5.72.9"); err != nil {
		t.Error(err)
	}
	if n.pool.reserved[netip.MustParseAddr("10.5.72.9")].Addr.IsValid() {
		t.Error("still reserved")
	}
}
