// This file compares what becomes of a network configuration: flannel's ParseConfig and CheckNetworkConfig against ours.

package leases

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/subnet"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

// verdict is what one side makes of a configuration; the zero verdict refuses it.
type verdict struct {
	ok                bool
	network, network6 netip.Prefix
	lo, hi, lo6, hi6  netip.Addr
	bits, bits6       int
	backend           string // lower case
}

func flannelSays(config string) (verdict, error) {
	c, err := subnet.ParseConfig(config)
	if err == nil {
		err = subnet.CheckNetworkConfig(c)
	}
	if err != nil {
		return verdict{}, err
	}
	// Lower case as in flannel's backend manager, which is the only one to look at it.
	v := verdict{ok: true, backend: strings.ToLower(c.BackendType)}
	if c.EnableIPv4 {
		v.network, v.lo, v.hi, v.bits = prefix4(c.Network), addr4(c.SubnetMin), addr4(c.SubnetMax), int(c.SubnetLen)
	}
	if c.EnableIPv6 {
		v.network6, v.lo6, v.hi6, v.bits6 = prefix6(c.IPv6Network), addr6(c.IPv6SubnetMin), addr6(c.IPv6SubnetMax), int(c.IPv6SubnetLen)
	}
	return v, nil
}

func weSay(config string) (verdict, error) {
	c, err := lease.ParseConfig([]byte(config))
	if err != nil {
		return verdict{}, err
	}
	return verdict{
		ok: true, backend: c.BackendType,
		network: c.Network, lo: c.SubnetMin, hi: c.SubnetMax, bits: c.SubnetLen,
		network6: c.IPv6Network, lo6: c.IPv6SubnetMin, hi6: c.IPv6SubnetMax, bits6: c.IPv6SubnetLen,
	}, nil
}

func addr4(a ip.IP4) netip.Addr {
	b1, b2, b3, b4 := a.Octets()
	return netip.AddrFrom4([4]byte{b1, b2, b3, b4})
}

func addr6(a *ip.IP6) netip.Addr {
	var b [16]byte
	(*big.Int)(a).FillBytes(b[:])
	return netip.AddrFrom16(b)
}

func prefix4(n ip.IP4Net) netip.Prefix { return netip.PrefixFrom(addr4(n.IP), int(n.PrefixLen)) }
func prefix6(n ip.IP6Net) netip.Prefix { return netip.PrefixFrom(addr6(n.IP), int(n.PrefixLen)) }

// difference is a rule of ours that is not flannel's, or the other way round.
type difference struct {
	name     string
	weAccept bool   // and flannel does not
	example  string // a configuration that shows it
	applies  func(config string, theirs verdict) bool
}

// members are the configuration's, in lower case, with their JSON.
func members(config string) map[string]string {
	var m map[string]json.RawMessage
	_ = json.Unmarshal([]byte(config), &m) // not JSON has no members
	lower := make(map[string]string, len(m))
	for name, value := range m {
		lower[strings.ToLower(name)] = string(value)
	}
	return lower
}

var leadingZero = regexp.MustCompile(`/0\d`)

var differences = []difference{
	{
		name: "a network without IPv4", example: `{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48"}`,
		applies: func(config string, _ verdict) bool { return members(config)["enableipv4"] == "false" },
	},
	{
		name: "SubnetMin above SubnetMax: nothing could be leased", example: `{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.8.0"}`,
		applies: func(_ string, theirs verdict) bool {
			return theirs.hi.Less(theirs.lo) || theirs.hi6.Less(theirs.lo6)
		},
	},
	{
		name: "a Backend without a Type: flanneld accepts it here and ends with an unknown backend type", example: `{"Network":"10.5.0.0/16","Backend":{"Port":8285}}`,
		applies: func(_ string, theirs verdict) bool { return theirs.ok && theirs.backend == "" },
	},
	{
		name: "an IPv4 network as IPv6Network", example: `{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"10.6.0.0/16","IPv6SubnetLen":126}`,
		applies: func(_ string, theirs verdict) bool { return theirs.network6.Addr().Is4In6() },
	},
	{
		name: "an IPv4 address in IPv6 notation", example: `{"Network":"10.5.0.0/16","SubnetMin":"::ffff:10.5.4.0"}`,
		applies: func(config string, _ verdict) bool { return strings.Contains(config, "::ffff:") },
	},
	{
		name: "a prefix length with leading zeros", example: `{"Network":"10.5.0.0/016"}`,
		applies: func(config string, _ verdict) bool { return leadingZero.MatchString(config) },
	},
	{
		name: "more than 64 KB", example: `{"Network":"10.5.0.0/16"` + strings.Repeat(" ", lease.MaxValue) + `}`,
		applies: func(config string, _ verdict) bool { return len(config) > lease.MaxValue },
	},
	{
		name: "null as an address or network counts as absent", weAccept: true, example: `{"Network":"10.5.0.0/16","SubnetMin":null}`,
		applies: func(config string, _ verdict) bool {
			m := members(config)
			return m["subnetmin"] == "null" || m["subnetmax"] == "null" || m["ipv6network"] == "null"
		},
	},
	{
		name: "a slash that JSON escapes, as PHP does", weAccept: true, example: `{"Network":"10.5.0.0\/16"}`,
		applies: func(config string, _ verdict) bool { return strings.Contains(config, `\/`) },
	},
}

// compare fails the test where the two disagree and no difference explains it; it returns whether both accept.
func compare(t *testing.T, config string) bool {
	t.Helper()
	theirs, theirErr := flannelSays(config)
	ours, ourErr := weSay(config)
	if ourErr != nil && !errors.Is(ourErr, lease.ErrBadConfig) {
		t.Errorf("%s: the error is no ErrBadConfig: %v", config, ourErr)
	}
	if ours.ok == theirs.ok {
		if ours != theirs {
			t.Errorf("%s:\nflannel %+v\nours    %+v", config, theirs, ours)
		}
		return ours.ok
	}
	for _, d := range differences {
		if d.weAccept == ours.ok && d.applies(config, theirs) {
			return false
		}
	}
	t.Errorf("%.500s:\nflannel: accepts %t, %v\nours: accepts %t, %v", config, theirs.ok, theirErr, ours.ok, ourErr)
	return false
}

func TestConfig_DiffersFromFlannelOnlyOnPurpose(t *testing.T) {
	for _, d := range differences {
		t.Run(d.name, func(t *testing.T) {
			theirs, theirErr := flannelSays(d.example)
			ours, ourErr := weSay(d.example)
			if ours.ok != d.weAccept || theirs.ok == d.weAccept {
				t.Errorf("no such difference: flannel accepts %t, %v; we accept %t, %v", theirs.ok, theirErr, ours.ok, ourErr)
			}
			if !d.applies(d.example, theirs) {
				t.Error("the rule does not know its own example")
			}
		})
	}
}

// Every rule of flannel's Documentation/configuration.md, ParseConfig and CheckNetworkConfig, from both sides.
func TestConfig_FollowsEveryRuleOfFlannel(t *testing.T) {
	v6 := func(rest string) string { return `{"EnableIPv6":true,"Network":"10.5.0.0/16"` + rest + `}` }
	for _, c := range []struct {
		name, config string
		ok           bool
	}{
		{"Network alone", `{"Network":"10.5.0.0/16"}`, true},
		{"Network missing", `{}`, false},
		{"Network empty", `{"Network":""}`, false},
		{"Network null", `{"Network":null}`, false},
		{"Network without a length", `{"Network":"10.5.0.0"}`, false},
		{"Network of another family", `{"Network":"fd00::/48"}`, false},
		{"Network of length 33", `{"Network":"10.5.0.0/33"}`, false},
		{"Network with host bits", `{"Network":"172.200.5.9/16"}`, true},
		{"Network of everything", `{"Network":"0.0.0.0/0"}`, false},
		{"Network with a zero in front", `{"Network":"010.5.0.0/16"}`, false},
		{"Network at the end of the address space", `{"Network":"255.255.0.0/16"}`, true},
		{"Network of half the address space", `{"Network":"128.0.0.0/1"}`, true},
		{"names in lower case", `{"network":"10.5.0.0/16","subnetlen":26}`, true},
		{"a member twice", `{"Network":"10.5.0.0/16","Network":"10.6.0.0/16"}`, true},
		{"an unknown member", `{"Network":"10.5.0.0/16","Mtu":{"x":[1]}}`, true},

		{"SubnetLen 30", `{"Network":"10.5.0.0/16","SubnetLen":30}`, true},
		{"SubnetLen 31", `{"Network":"10.5.0.0/16","SubnetLen":31}`, false},
		{"SubnetLen for four subnets", `{"Network":"10.5.0.0/16","SubnetLen":18}`, true},
		{"SubnetLen for two subnets", `{"Network":"10.5.0.0/16","SubnetLen":17}`, false},
		{"SubnetLen 0", `{"Network":"10.5.0.0/16","SubnetLen":0}`, true},
		{"SubnetLen null", `{"Network":"10.5.0.0/16","SubnetLen":null}`, true},
		{"SubnetLen negative", `{"Network":"10.5.0.0/16","SubnetLen":-1}`, false},
		{"SubnetLen no number", `{"Network":"10.5.0.0/16","SubnetLen":"24"}`, false},
		{"SubnetLen no whole number", `{"Network":"10.5.0.0/16","SubnetLen":24.5}`, false},
		{"SubnetLen beyond 64 bits", `{"Network":"10.5.0.0/16","SubnetLen":18446744073709551616}`, false},
		{"no SubnetLen, /22", `{"Network":"10.5.0.0/22"}`, true},
		{"no SubnetLen, /23", `{"Network":"10.5.0.0/23"}`, true},
		{"no SubnetLen, /28", `{"Network":"10.5.0.0/28"}`, true},
		{"no SubnetLen, /29", `{"Network":"10.5.0.0/29"}`, false},
		{"SubnetLen does not help a /29", `{"Network":"10.5.0.0/29","SubnetLen":30}`, false},

		{"SubnetMin and SubnetMax", `{"Network":"10.5.0.0/16","SubnetMin":"10.5.5.0","SubnetMax":"10.5.8.0","SubnetLen":28}`, true},
		{"SubnetMin is SubnetMax", `{"Network":"10.5.0.0/16","SubnetMin":"10.5.5.0","SubnetMax":"10.5.5.0"}`, true},
		{"SubnetMin the first subnet", `{"Network":"10.5.0.0/16","SubnetMin":"10.5.0.0"}`, true},
		{"SubnetMin outside", `{"Network":"10.5.0.0/16","SubnetMin":"10.6.0.0"}`, false},
		{"SubnetMax outside", `{"Network":"10.5.0.0/16","SubnetMax":"10.4.255.0"}`, false},
		{"SubnetMin not aligned", `{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.128"}`, false},
		{"SubnetMax not aligned", `{"Network":"10.5.0.0/16","SubnetMax":"10.5.9.1"}`, false},
		{"SubnetMin and SubnetMax zero", `{"Network":"10.5.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0"}`, true},
		{"SubnetMin empty", `{"Network":"10.5.0.0/16","SubnetMin":""}`, false},
		{"SubnetMax empty", `{"Network":"10.5.0.0/16","SubnetMax":""}`, false},
		{"SubnetMin no address", `{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0/24"}`, false},
		{"SubnetMin of another family", `{"Network":"10.5.0.0/16","SubnetMin":"fd00::"}`, false},
		{"SubnetMin a number", `{"Network":"10.5.0.0/16","SubnetMin":5}`, false},

		{"EnableIPv4 null", `{"EnableIPv4":null,"Network":"10.5.0.0/16"}`, true},
		{"EnableIPv4 no truth", `{"EnableIPv4":"true","Network":"10.5.0.0/16"}`, false},
		{"EnableIPv6 no truth", `{"EnableIPv6":1,"Network":"10.5.0.0/16"}`, false},
		{"EnableNFTables", `{"EnableNFTables":true,"Network":"10.5.0.0/16"}`, true},
		{"EnableNFTables no truth", `{"EnableNFTables":"yes","Network":"10.5.0.0/16"}`, false},

		{"IPv6 off, its members still read", `{"Network":"10.5.0.0/16","IPv6Network":"fd00:5::/48","IPv6SubnetMin":"fd00:6::","IPv6SubnetLen":1}`, true},
		{"IPv6 off, IPv6Network no network", `{"Network":"10.5.0.0/16","IPv6Network":"fd00:5::"}`, false},
		{"IPv6 off, IPv6Network empty", `{"Network":"10.5.0.0/16","IPv6Network":""}`, false},
		{"IPv6 off, IPv6SubnetMin no address", `{"Network":"10.5.0.0/16","IPv6SubnetMin":"x"}`, false},
		{"IPv6 off, IPv6SubnetMax empty", `{"Network":"10.5.0.0/16","IPv6SubnetMax":""}`, false},
		{"IPv6 off, IPv6SubnetMax with a zone", `{"Network":"10.5.0.0/16","IPv6SubnetMax":"fe80::1%eth0"}`, false},
		{"IPv6 off, IPv6SubnetLen negative", `{"Network":"10.5.0.0/16","IPv6SubnetLen":-1}`, false},
		{"IPv6 without IPv6Network", v6(``), false},
		{"IPv6Network of everything", v6(`,"IPv6Network":"::/0"`), false},
		{"IPv6Network /48", v6(`,"IPv6Network":"fd00:5::/48"`), true},
		{"IPv6Network with host bits", v6(`,"IPv6Network":"fd00:5::7/48"`), true},
		{"IPv6Network at the end", v6(`,"IPv6Network":"ffff::/16"`), true},
		{"no IPv6SubnetLen, /62", v6(`,"IPv6Network":"fd00:5::/62"`), true},
		{"no IPv6SubnetLen, /63", v6(`,"IPv6Network":"fd00:5::/63"`), true},
		{"no IPv6SubnetLen, /124", v6(`,"IPv6Network":"fd00:5::/124"`), true},
		{"no IPv6SubnetLen, /125", v6(`,"IPv6Network":"fd00:5::/125"`), false},
		{"IPv6SubnetLen 126", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetLen":126`), true},
		{"IPv6SubnetLen 127", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetLen":127`), false},
		{"IPv6SubnetLen for four subnets", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetLen":50`), true},
		{"IPv6SubnetLen for two subnets", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetLen":49`), false},
		{"IPv6SubnetMin and Max", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMin":"fd00:5:0:5::","IPv6SubnetMax":"fd00:5:0:8::"`), true},
		{"IPv6SubnetMin and Max zero", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMin":"::","IPv6SubnetMax":"::"`), true},
		{"IPv6SubnetMin and Max null", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMin":null,"IPv6SubnetMax":null`), true},
		{"IPv6SubnetMin outside", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMin":"fd00:6::"`), false},
		{"IPv6SubnetMax outside", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMax":"fd00:4::"`), false},
		{"IPv6SubnetMin not aligned", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMin":"fd00:5::1"`), false},
		{"IPv6SubnetMax not aligned", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMax":"fd00:5:0:1:8000::"`), false},
		{"IPv6SubnetMin of another family", v6(`,"IPv6Network":"fd00:5::/48","IPv6SubnetMin":"10.5.0.0"`), false},

		{"Backend of every type", `{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}`, true},
		{"Backend in capitals", `{"Network":"10.5.0.0/16","Backend":{"Type":"VXLAN","VNI":7,"Port":8472,"DirectRouting":true}}`, true},
		{"Backend of no known type", `{"Network":"10.5.0.0/16","Backend":{"Type":"carrier-pigeon"}}`, true},
		{"Backend with another member wrong", `{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":"x"}}`, true},
		{"Backend no object", `{"Network":"10.5.0.0/16","Backend":"udp"}`, false},
		{"Backend's Type no string", `{"Network":"10.5.0.0/16","Backend":{"Type":5}}`, false},

		{"nothing", ``, false},
		{"not JSON", `network`, false},
		{"null", `null`, false},
		{"an array", `[]`, false},
		{"more after the object", `{"Network":"10.5.0.0/16"}}`, false},
		{"half an object", `{"Network":"10.5.0.0/16"`, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if ok := compare(t, c.config); ok != c.ok {
				t.Errorf("%s: both accept: %t, want %t", c.config, ok, c.ok)
			}
		})
	}
}

func TestConfig_AgreesWithFlannelOnGeneratedOnes(t *testing.T) {
	const count = 20000
	r := rand.New(rand.NewPCG(4, 28))
	accepted, dual := 0, 0
	for range count {
		config := generated(r)
		if compare(t, config) {
			accepted++
			if strings.Contains(config, `"EnableIPv6":true`) {
				dual++
			}
		}
		if t.Failed() {
			t.FailNow() // one is enough to read
		}
	}
	t.Logf("%d configurations, %d accepted, %d of those dual-stack", count, accepted, dual)
	if accepted < count/10 || accepted > count*9/10 || dual < count/100 {
		t.Error("the generator leans to one side")
	}
}

// generated is a configuration in which most members are absent or right.
func generated(r *rand.Rand) string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, fmt.Sprintf("%q:%s", name, value))
		}
	}
	quoted := func(a any) string { return fmt.Sprintf(`"%v"`, a) }
	odd := func(of ...string) string { return of[r.IntN(len(of))] }
	chance := func(percent int) bool { return r.IntN(100) < percent }

	n4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(1 + r.IntN(255)), byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())}), 8+r.IntN(22))
	if chance(10) {
		n4 = netip.PrefixFrom(n4.Addr(), 1+r.IntN(32))
	}
	var b6 [16]byte
	for i := range b6 {
		b6[i] = byte(r.Uint32())
	}
	b6[0] |= 0x20 // flannel writes the addresses of ::/64 as IPv4
	n6 := netip.PrefixFrom(netip.AddrFrom16(b6), []int{32, 48, 56, 62, 63, 64, 112, 120, 123, 124, 125, 1 + r.IntN(128)}[r.IntN(12)])

	for _, f := range []struct {
		name    string
		network netip.Prefix
		longest int
		absent  int // per cent of configurations that leave the network out
		odd     []string
	}{
		{"", n4, 30, 2, []string{`""`, `null`, `"10.5.0.0"`, `"fd00::/48"`, `"0.0.0.0/0"`, `"10.5.0.0/33"`, `"10.5.0.0/016"`, `5`, `"10.5.0.0\/16"`}},
		{"IPv6", n6, 126, 40, []string{`""`, `null`, `"fd00::"`, `"10.6.0.0/16"`, `"::/0"`, `"fd00::/129"`, `"fd00::/048"`, `[]`}},
	} {
		network := f.network
		if chance(50) {
			network = network.Masked()
		}
		switch {
		case chance(4):
			add(f.name+"Network", odd(f.odd...))
		case !chance(f.absent):
			add(f.name+"Network", quoted(network))
		}
		bits := network.Bits() + 2
		switch {
		case chance(40):
			bits = min(f.longest, network.Bits()+1+r.IntN(14))
			add(f.name+"SubnetLen", fmt.Sprint(bits))
		case chance(5):
			add(f.name+"SubnetLen", odd("0", "-1", "31", "127", `"24"`, "null", "2.5"))
		case f.name == "" && network.Bits() <= 22:
			bits = 24
		case f.name != "" && network.Bits() <= 62:
			bits = 64
		}
		for _, bound := range []string{"SubnetMin", "SubnetMax"} {
			switch {
			case chance(60):
			case chance(5):
				add(f.name+bound, odd(`""`, `null`, `"x"`, `"0.0.0.0"`, `"::"`, `"::ffff:10.5.4.0"`, `"10.5.4.0"`, `"fd00::"`, `7`))
			default:
				a := network.Masked().Addr().AsSlice()
				for i := network.Bits(); i < min(bits, len(a)*8); i++ { // any subnet of the network
					if chance(50) {
						a[i/8] |= 1 << (7 - i%8)
					}
				}
				if chance(7) { // not aligned, or outside
					a[r.IntN(len(a))] ^= 1 << r.IntN(8)
				}
				addr, _ := netip.AddrFromSlice(a)
				add(f.name+bound, quoted(addr))
			}
		}
	}
	switch {
	case chance(50):
		add("EnableIPv6", "true")
	case chance(5):
		add("EnableIPv6", odd("false", "null", "1", `"true"`))
	}
	if chance(5) {
		add("EnableIPv4", odd("true", "false", "null", "0"))
	}
	if chance(5) {
		add("EnableNFTables", odd("true", "false", "null", `"x"`))
	}
	if chance(30) {
		add("Backend", odd(`{"Type":"udp"}`, `{"Type":"udp","Port":7890}`, `{"Type":"VXLAN","VNI":1}`, `{"type":"wireguard"}`, `{"Type":"x"}`, `{}`, `null`, `"udp"`, `{"Type":5}`, `{"Type":null}`, `[]`))
	}
	r.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
	return "{" + strings.Join(parts, ",") + "}"
}
