// This file is the key of a lease (pkg/subnet/subnet.go MakeSubnetKey and ParseSubnetKey of flannel):
//
//	<prefix>/subnets/10.5.34.0-24                       IPv4
//	<prefix>/subnets/10.5.34.0-24&fd00:0:0:12::-64      dual-stack
//
// flannel lists and watches everything that begins with <prefix>/subnets, without a slash, and takes a key that merely
// ends like a subnet for a lease. We read as loosely as it does, so that both see the same leases.

package lease

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
)

// keyEnd is flannel's expression except that every dot is a dot.
var keyEnd = regexp.MustCompile(`(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f\d:]+)-(\d+))?$`)

// maxKey bounds a key in bytes before the expression is tried.
const maxKey = 4096

// Key is the last part of a lease's key. v6 may be the zero Prefix.
func Key(v4, v6 netip.Prefix) string {
	s := fmt.Sprintf("%v-%d", v4.Addr(), v4.Bits())
	if v6.IsValid() {
		s += fmt.Sprintf("&%v-%d", v6.Addr(), v6.Bits())
	}
	return s
}

// ParseKey reads the subnets out of a key, in full or its last part. v6 is the zero Prefix for an IPv4 lease. Host bits
// are masked off.
func ParseKey(key string) (v4, v6 netip.Prefix, err error) {
	fail := func(why string) (netip.Prefix, netip.Prefix, error) {
		return netip.Prefix{}, netip.Prefix{}, fmt.Errorf("key %.200q: %s", key, why)
	}
	if len(key) > maxKey {
		return fail("too long for a lease")
	}
	m := keyEnd.FindStringSubmatch(key)
	if m == nil {
		return fail("does not end in a subnet")
	}
	var ok bool
	if v4, ok = prefixOf(m[1], m[2], 31); !ok || !v4.Addr().Is4() {
		return fail("does not end in an IPv4 subnet")
	}
	if m[3] == "" {
		return v4, netip.Prefix{}, nil
	}
	if v6, ok = prefixOf(m[3], m[4], 127); !ok || !v6.Addr().Is6() {
		return fail("does not end in an IPv6 subnet")
	}
	return v4, v6, nil
}

// prefixOf joins an address and a length of at most maxBits; flannel reads lengths with 5 and 7 bits.
func prefixOf(addr, bits string, maxBits int) (netip.Prefix, bool) {
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return netip.Prefix{}, false
	}
	n, err := strconv.Atoi(bits)
	if err != nil || n > maxBits {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, n).Masked(), true
}
