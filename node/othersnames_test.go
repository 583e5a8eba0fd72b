// Tests of what is believed of other nodes' names.

package node

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	mdns "github.com/miekg/dns"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// namesNode is a ready node with 10.5.1.0/24, which knows node b by its lease of 10.5.2.0/24 and a flannel host by that of 10.5.3.0/24.
func namesNode(t *testing.T) (*namedNode, *bytes.Buffer) {
	t.Helper()
	w, c, logged := newWorld(), testConfig(t), &bytes.Buffer{}
	c.Log = slog.New(slog.NewTextHandler(logged, nil))
	n := &namedNode{readyNode(t, w, c, "10.5.1.0/24"), w, nil}
	n.id = strings.Repeat("1", 32)
	n.setLeases([]lease.Lease{
		leaseOf("10.5.1.0/24", n.id), leaseOf("10.5.2.0/24", "b"), leaseOf("10.5.3.0/24", ""),
	})
	return n, logged
}

func leaseOf(subnet, nodeID string) lease.Lease {
	l := lease.Lease{Subnet: netip.MustParsePrefix(subnet), Attrs: lease.Attrs{PublicIP: netip.MustParseAddr("192.0.2.7"), BackendType: "udp"}}
	if nodeID != "" {
		l.Attrs.RootlessOvl = &lease.Extension{V: 1, NodeID: nodeID}
	}
	return l
}

func theirs(name, nodeID, addr string) lease.Name {
	return lease.Name{Name: name, NodeID: nodeID, Addr: netip.MustParseAddr(addr)}
}

func TestNames_OfOthersAreBelievedOfTheirOwnSubnetsOnly(t *testing.T) {
	n, logged := namesNode(t)
	n.attach(t, api.AttachRequest{PID: 11, Name: "mine"})
	n.mu.Lock() // it stays while the subnet goes to another
	n.pool.subnet = netip.MustParsePrefix("10.5.7.0/24")
	n.mu.Unlock()
	six := theirs("six", "b", "10.5.2.9")
	six.Addr6 = netip.MustParseAddr("2001:db8::1")
	s := lease.NamesSnapshot{Names: []lease.Name{
		theirs("flannels", "b", "10.5.3.2"),
		theirs("good", "b", "10.5.2.2"),
		theirs("localhost", "b", "10.5.2.3"),
		theirs("mine", "b", "10.5.7.2"),
		theirs("minetoo", "b", "10.5.1.2"),
		theirs("outside", "b", "198.51.100.1"),
		theirs("notc", "c", "10.5.2.4"),
		six,
		theirs("unknown", "c", "10.5.9.2"),
	}}
	for range 2 {
		n.setNames(s)
	}
	const client = "10.5.1.9"
	for name, want := range map[string]string{
		"good.ovl.internal.":      "NOERROR 10.5.2.2",
		"six.ovl.internal.":       "NOERROR 10.5.2.9",
		"unknown.ovl.internal.":   "NOERROR 10.5.9.2", // its lease may be on its way
		"mine.ovl.internal.":      "NOERROR 10.5.1.2",
		"minetoo.ovl.internal.":   "NXDOMAIN",
		"outside.ovl.internal.":   "NXDOMAIN",
		"notc.ovl.internal.":      "NXDOMAIN",
		"flannels.ovl.internal.":  "NXDOMAIN",
		"localhost.ovl.internal.": "NXDOMAIN",
		"localhost.":              "NOERROR 127.0.0.1",
	} {
		if got := n.says(t, client, name, mdns.TypeA); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	if got := n.says(t, client, "six.ovl.internal.", mdns.TypeAAAA); got != "NOERROR" {
		t.Errorf("the IPv6 address of another family's network: %s", got)
	}
	for addr, want := range map[string]string{"2.1.5.10": "NOERROR mine.ovl.internal.", "4.2.5.10": "NXDOMAIN", "2.7.5.10": "NXDOMAIN"} {
		if got := n.says(t, client, addr+".in-addr.arpa.", mdns.TypePTR); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
	if got := strings.Count(logged.String(), "passing over a name in the store"); got != 6 {
		t.Errorf("%d log lines, want one for each of 6:\n%s", got, logged)
	}
	// What its lease says of c comes.
	n.setLeases([]lease.Lease{leaseOf("10.5.2.0/24", "c")})
	if got := n.says(t, client, "notc.ovl.internal.", mdns.TypeA); got != "NOERROR 10.5.2.4" {
		t.Errorf("with a lease of its own: %s", got)
	}
	if got := n.says(t, client, "good.ovl.internal.", mdns.TypeA); got != "NXDOMAIN" {
		t.Errorf("without: %s", got)
	}
}

func TestNames_ZoneStaysWhereNothingHasChanged(t *testing.T) {
	n, _ := namesNode(t)
	zone := func() any {
		n.w.mu.Lock()
		defer n.w.mu.Unlock()
		return n.w.zone
	}
	n.attach(t, api.AttachRequest{PID: 11, Name: "web", Aliases: []string{"front"}})
	n.attach(t, api.AttachRequest{PID: 12, Name: "db", Aliases: []string{"front"}})
	was := zone()
	n.republish() // another path MTU
	n.setNames(lease.NamesSnapshot{Revision: 7})
	if zone() != was {
		t.Error("another zone, though nothing has changed")
	}
	for what, change := range map[string]func(){
		"a name": func() { n.setNames(lease.NamesSnapshot{Names: []lease.Name{theirs("x", "b", "10.5.2.2")}}) },
		"an alias": func() {
			n.setNames(lease.NamesSnapshot{Names: []lease.Name{{Name: "x", NodeID: "b", Addr: netip.MustParseAddr("10.5.2.2"), Aliases: []string{"y"}}}})
		},
		"a container": func() { n.attach(t, api.AttachRequest{PID: 13}) },
		"a lease":     func() { n.setLeases([]lease.Lease{leaseOf("10.5.2.0/24", "c")}) },
	} {
		n.setLeases([]lease.Lease{leaseOf("10.5.2.0/24", "b")})
		n.setNames(lease.NamesSnapshot{Names: []lease.Name{theirs("before", "b", "10.5.2.2")}})
		was := zone()
		if change(); zone() == was {
			t.Errorf("%s changes nothing", what)
		}
	}
}

// A lease of all that there is, or of a part of what somebody has, gives its node no word about other nodes' addresses.
func TestNames_ALeaseOfEverythingGivesNoWordAboutOthers(t *testing.T) {
	for _, wide := range []string{"10.5.0.0/16", "0.0.0.0/0", "10.5.2.0/25"} {
		n, _ := namesNode(t)
		evil := leaseOf(wide, "evil")
		evil.ModRevision = 7
		theirs2 := leaseOf("10.5.2.0/24", "b")
		theirs2.ModRevision = 9
		n.setLeases([]lease.Lease{leaseOf("10.5.1.0/24", n.id), theirs2, evil})
		n.mu.Lock()
		n.known = []lease.Name{theirs("bad", "evil", "10.5.2.9"), theirs("good", "b", "10.5.2.9")}
		believed, doubts := n.believedNamesLocked()
		n.mu.Unlock()
		if len(believed) != 1 || believed[0].Name != "good" || len(doubts) != 1 {
			t.Errorf("with a lease of %s: believed %v, doubted %v", wide, believed, doubts)
		}
	}
}
