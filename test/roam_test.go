// Tests of a host whose address changes while its containers talk to others.

package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// newAddr is what the host gets instead of its own.
var newAddr = netip.MustParseAddr("192.0.2.77")

// conversation is a TCP connection of a container to another, which answers each line.
type conversation struct {
	conn  net.Conn
	lines *bufio.Reader
	said  int
}

func converse(t *testing.T, from, to *member) *conversation {
	t.Helper()
	at := port(to.addr, 7070).String()
	l, err := to.Listen("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for lines := bufio.NewScanner(c); lines.Scan(); {
			fmt.Fprintln(c, "you said", lines.Text())
		}
	}()
	conn, err := from.DialContext(t.Context(), "tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &conversation{conn: conn, lines: bufio.NewReader(conn)}
}

// goesOn fails the test unless the connection still carries a line each way.
func (c *conversation) goesOn(t *testing.T) {
	t.Helper()
	c.said++
	_ = c.conn.SetDeadline(time.Now().Add(40 * time.Second))
	fmt.Fprintln(c.conn, c.said)
	if got, err := c.lines.ReadString('\n'); err != nil || got != fmt.Sprintf("you said %d\n", c.said) {
		t.Errorf("line %d: %q, %v", c.said, got, err)
	}
}

// peerAddress is where a daemon sends to its only peer.
func peerAddress(t *testing.T, d *lab.Daemon) string {
	t.Helper()
	var peers []struct {
		PublicIP string `json:"public_ip"`
	}
	if err := d.Get("/v1/peers", &peers); err != nil || len(peers) != 1 {
		t.Fatalf("peers: %v, %v", peers, err)
	}
	return peers[0].PublicIP
}

func storedLease(t *testing.T, c *clientv3.Client, subnet string) (create, mod int64, publicIP string) {
	t.Helper()
	resp, err := c.Get(t.Context(), subnetKey(subnet))
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("lease of %s: %v, %v", subnet, resp, err)
	}
	var v struct{ PublicIP string }
	if err := json.Unmarshal(resp.Kvs[0].Value, &v); err != nil {
		t.Fatal(err)
	}
	return resp.Kvs[0].CreateRevision, resp.Kvs[0].ModRevision, v.PublicIP
}

func TestRoam_ContainersKeepTalking(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"udp", "vxlan"} {
		t.Run(backend, func(t *testing.T) {
			l, e, client := withVXLAN(t, 2, fmt.Sprintf(`{"Network":%q,"Backend":{"Type":%q}}`, network, backend))
			h1, h2 := l.Host(1), l.Host(2)
			d1, d2 := h1.Up("--etcd-endpoints", e.Endpoint), h2.Up("--etcd-endpoints", e.Endpoint)
			waitPeers(t, 1, d1, d2)
			a, b := join(t, h1, "a"), join(t, h2, "b")
			a.HTTPServer(t, port(a.addr, 8080))
			talk := converse(t, b, a)
			talk.goesOn(t)
			ping, err := a.StartPing(b.addr, lab.PingOptions{})
			if err != nil {
				t.Fatal(err)
			}
			before, attached := d2.Status(), d2.Attachments()
			created, modified, _ := storedLease(t, client, before.Subnet)

			old := h2.Addr
			if err := h2.LoseAddress(); err != nil {
				t.Fatal(err)
			}
			if err := h2.GetAddress(newAddr); err != nil {
				t.Fatal(err)
			}
			lab.Eventually(t, "the peer sends to the new address", func() bool { return peerAddress(t, d1) == newAddr.String() })
			got := ping.Received()
			lab.Eventually(t, "echoes come back again", func() bool { return ping.Received() > got+5 })
			talk.goesOn(t)
			t.Logf("ping: %v", ping.Stop())
			pings(t, a.Space, b.addr)
			pings(t, b.Space, a.addr)
			bigTransfers(t, b, a, 20<<20)

			now := d2.Status()
			if now.PublicIP != newAddr.String() || now.Subnet != before.Subnet || now.NodeID != before.NodeID || now.Port != before.Port ||
				now.State != "ready" || now.PID != before.PID || now.Problem != "" {
				t.Errorf("status %+v, before %+v", now, before)
			}
			if again := d2.Attachments(); !reflect.DeepEqual(again, attached) {
				t.Errorf("attachments %+v, before %+v", again, attached)
			}
			create, mod, public := storedLease(t, client, before.Subnet)
			if create != created || mod == modified || public != newAddr.String() {
				t.Errorf("the lease has %s, created at %d (was %d), changed at %d (was %d)", public, create, created, mod, modified)
			}
			if all := keys(t, client, prefix+"/subnets"); len(all) != 2 {
				t.Errorf("leases %v", all)
			}
			for what, n := range map[string]int{"the external address has changed": 1, "the lease has the new address": 1, "level=ERROR": 0} {
				if got := strings.Count(d2.LogText(), what); got != n {
					t.Errorf("%d lines of %q:\n%s", got, what, d2.LogText())
				}
			}

			// And home again.
			if err := h2.LoseAddress(); err != nil {
				t.Fatal(err)
			}
			if err := h2.GetAddress(old); err != nil {
				t.Fatal(err)
			}
			lab.Eventually(t, "the peer sends to the old address", func() bool { return peerAddress(t, d1) == old.String() })
			talk.goesOn(t)
			pings(t, a.Space, b.addr)
		})
	}
}

func TestRoam_AHostWithoutAnAddressWaits(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b, c := join(t, s.h1, "a"), join(t, s.h2, "b"), join(t, s.h2, "c")
	talk := converse(t, a, b)
	talk.goesOn(t)
	before, old := s.d2.Status(), s.h2.Addr
	if err := s.h2.LoseAddress(); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "status says so", func() bool { return strings.Contains(s.d2.Status().Problem, "no external address") })
	noPing(t, a.Space, b.addr)
	pings(t, c.Space, b.addr) // on the host itself nothing changes
	pings(t, b.Space, b.gateway)
	if err := s.h2.GetAddress(old); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "the trouble is over", func() bool { return s.d2.Status().Problem == "" })
	talk.goesOn(t)
	pings(t, a.Space, b.addr)
	if err := s.h2.LoseAddress(); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "status says so again", func() bool { return s.d2.Status().Problem != "" })
	if err := s.h2.GetAddress(newAddr); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "the peer sends to another address", func() bool { return peerAddress(t, s.d1) == newAddr.String() })
	talk.goesOn(t)
	if now := s.d2.Status(); now.Subnet != before.Subnet || now.Attachments != 2 || now.Problem != "" {
		t.Errorf("status %+v, before %+v", now, before)
	}
	if n := strings.Count(s.d2.LogText(), "no external address any more"); n != 2 {
		t.Errorf("%d warnings of two events:\n%s", n, s.d2.LogText())
	}
}

// The embedded store that listens on every address has no password: no container reaches it at one that the host gets later.
func TestRoam_StoreStaysClosedToContainersAtEveryAddress(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up("--listen-etcd", "0.0.0.0:2379", "--network", network.String())
	a := join(t, h, "a")
	closed := func(addr netip.Addr) {
		t.Helper()
		if c, err := h.DialContext(t.Context(), "tcp4", port(addr, 2379).String()); err != nil {
			t.Errorf("the store does not listen there: %v", err)
		} else {
			c.Close()
		}
		if c, err := a.DialContext(t.Context(), "tcp4", port(addr, 2379).String()); err == nil {
			c.Close()
			t.Errorf("a container reached the store at %v", addr)
		}
	}
	closed(h.Addr)
	if err := h.GetAddress(newAddr); err != nil { // beside the one that it has
		t.Fatal(err)
	}
	closed(newAddr)
	h.HTTPServer(t, port(newAddr, 8080))
	if got, err := a.Fetch("http://" + port(newAddr, 8080).String() + "/"); err != nil {
		t.Errorf("another server of the host: %q, %v", got, err)
	}
}

// The same for containers of another node, which was given one of the addresses: the store's members say the others, of either family.
func TestStore_StaysClosedToContainersOfOtherNodes(t *testing.T) {
	t.Parallel()
	for listen, families := range map[string]int{"0.0.0.0:2379": 4, "[::]:2379": 6} {
		t.Run(listen, func(t *testing.T) {
			l := lab.New(t, 2, lab.WithIPv6)
			h1, h2 := l.Host(1), l.Host(2)
			if err := h1.GetAddress(newAddr); err != nil { // beside the one that it has
				t.Fatal(err)
			}
			h1.Up("--listen-etcd", listen, "--network", network.String())
			h2.Up("--etcd-endpoints", etcdURL(h1))
			a := join(t, h2, "a")
			h1.HTTPServer(t, port(netip.IPv6Unspecified(), 8080))
			for _, addr := range []netip.Addr{h1.Addr, newAddr, h1.Addr6} {
				at := port(addr, 2379).String()
				c, err := h2.DialContext(t.Context(), "tcp", at)
				if err == nil {
					c.Close()
				}
				if want := addr.Is4() || families == 6; (err == nil) != want {
					t.Errorf("listening at %s, the store answers at %v: %v, want %v", listen, addr, err, want)
				}
				if c, err := a.DialContext(t.Context(), "tcp", at); err == nil {
					c.Close()
					t.Errorf("a container reached the store at %v", addr)
				}
				if got, err := a.Fetch("http://" + port(addr, 8080).String() + "/"); err != nil {
					t.Errorf("another server of the host at %v: %q, %v", addr, got, err)
				}
			}
		})
	}
}
