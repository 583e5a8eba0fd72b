// This file compares the JSON of leases, in both directions.

package leases

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/flannel-io/flannel/pkg/ip"
	stock "github.com/flannel-io/flannel/pkg/lease"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// randomAttrs is what some backend publishes, as flannel holds it.
func randomAttrs(r *rand.Rand) stock.LeaseAttrs {
	data := func(of ...string) json.RawMessage { return json.RawMessage(of[r.IntN(len(of))]) }
	mac := fmt.Sprintf("%02x:%02x:32:6f:8f:44", r.IntN(256), r.IntN(256))
	a := stock.LeaseAttrs{PublicIP: ip.IP4(r.Uint32())}
	switch r.IntN(4) {
	case 1:
		a.BackendType, a.BackendData = "vxlan", json.RawMessage(fmt.Sprintf(`{"VNI":%d,"VtepMAC":%q}`, r.IntN(1<<24), mac))
	case 2:
		a.BackendType, a.BackendData = "wireguard", data(`{"PublicKey":"3f7q9mVbXk1h0u+0iUqHcV6nYV8bO3wM1rC1eXw3Zkk=","Port":51820}`, `{ "PublicKey": "x" }`)
	case 3:
		a.BackendType, a.BackendData = "extension", data(`"said by a command <&> \"quoted\" \u00fc"`, `null`, `[1, 2]`, `0.5`)
	}
	if r.IntN(2) == 0 {
		b := [16]byte{0: 0x20, 1: 0x01, 15: byte(1 + r.IntN(255)), 7: byte(r.IntN(2))}
		a.PublicIPv6 = ip.FromIP6(net.IP(b[:]))
		a.BackendV6Data = a.BackendData
	}
	return a
}

// same says whether ours holds what flannel's does.
func same(ours lease.Attrs, theirs stock.LeaseAttrs) bool {
	public := addr4(theirs.PublicIP)
	if public.IsUnspecified() {
		public = netip.Addr{}
	}
	var public6 netip.Addr
	if theirs.PublicIPv6 != nil {
		public6 = addr6(theirs.PublicIPv6)
	}
	return ours.PublicIP == public && ours.PublicIPv6 == public6 && ours.BackendType == theirs.BackendType &&
		bytes.Equal(ours.BackendData, theirs.BackendData) && bytes.Equal(ours.BackendV6Data, theirs.BackendV6Data)
}

func TestAttrs_OfFlannelAreReadAndWrittenByteForByte(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	for range 5000 {
		theirs, err := json.Marshal(randomAttrs(r))
		if err != nil {
			t.Fatal(err)
		}
		var read stock.LeaseAttrs
		if err := json.Unmarshal(theirs, &read); err != nil {
			t.Fatal(err)
		}
		ours, err := lease.ParseAttrs(theirs)
		if err != nil || !same(ours, read) || ours.RootlessOvl != nil {
			t.Fatalf("%s: ours %+v, %v", theirs, ours, err)
		}
		if again, err := json.Marshal(ours); err != nil || !bytes.Equal(again, theirs) {
			t.Fatalf("flannel writes %s, we write %s, %v", theirs, again, err)
		}
	}
}

func TestAttrs_OfOursAreFlannelsWithOneMemberMore(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	for range 5000 {
		plain, err := json.Marshal(randomAttrs(r))
		if err != nil {
			t.Fatal(err)
		}
		ours, err := lease.ParseAttrs(plain)
		if err != nil {
			t.Fatal(err)
		}
		ours.RootlessOvl = &lease.Extension{
			V: lease.ExtensionVersion, NodeID: "0123456789abcdef0123456789abcdef", Port: r.IntN(65536), MTU: 1472,
			Caps: []string{lease.CapPartialChecksums}, PublicKey: "a2V5",
		}
		written, err := json.Marshal(ours)
		if err != nil {
			t.Fatal(err)
		}
		var read stock.LeaseAttrs
		if err := json.Unmarshal(written, &read); err != nil {
			t.Fatalf("flannel cannot read %s: %v", written, err)
		}
		if !same(ours, read) {
			t.Fatalf("flannel reads %s as %s", written, read.String())
		}
		// What flannel would write of it is ours without the member.
		if again, err := json.Marshal(read); err != nil || !bytes.Equal(again, plain) {
			t.Fatalf("of %s flannel keeps %s, %v; want %s", written, again, err, plain)
		}
		if !bytes.HasPrefix(written, plain[:len(plain)-1]) {
			t.Fatalf("%s does not begin with %s", written, plain)
		}
	}
}

func TestAttrs_AreAcceptedAndRefusedTogether(t *testing.T) {
	for _, c := range []struct {
		json         string
		theirs, ours bool
	}{
		{`{}`, true, true},
		{`{"PublicIP":"192.0.2.1","PublicIPv6":null}`, true, true},
		{`{"publicip":"192.0.2.1","backendtype":"vxlan"}`, true, true},
		{`{"PublicIP":"192.0.2.1","Later":{"x":1}}`, true, true},
		{`{"PublicIP":"0.0.0.0"}`, true, true},
		{`{"PublicIP":"::ffff:192.0.2.1"}`, true, true},
		{`null`, true, true},
		{``, false, false},
		{`[]`, false, false},
		{`{"PublicIP":"192.0.2.256"}`, false, false},
		{`{"PublicIP":"2001:db8::1"}`, false, false},
		{`{"PublicIP":5}`, false, false},
		{`{"PublicIPv6":"x"}`, false, false},
		{`{"PublicIPv6":""}`, false, false},
		{`{"BackendType":5}`, false, false},
		// On purpose: a missing address is no reason to lose a lease, and one of the wrong family could not be sent to.
		{`{"PublicIP":null}`, false, true},
		{`{"PublicIP":""}`, false, true},
		{`{"PublicIPv6":"192.0.2.1"}`, true, false},
	} {
		theirErr := json.Unmarshal([]byte(c.json), new(stock.LeaseAttrs))
		_, ourErr := lease.ParseAttrs([]byte(c.json))
		if (theirErr == nil) != c.theirs || (ourErr == nil) != c.ours {
			t.Errorf("%s: flannel %v, want accepted %t; ours %v, want accepted %t", c.json, theirErr, c.theirs, ourErr, c.ours)
		}
	}
}
