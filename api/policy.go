// This file is what an attachment may exchange with other containers, with the outside and with the host: the words of the flags, and
// what they mean.

package api

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Policy is what an attachment may reach and be reached from. The zero value is the default: the other containers of the overlay and the
// outside, not the host. The gateway, published ports and names are no other containers.
type Policy struct {
	// Isolate closes both directions to the other containers of the overlay, but for the rules of AllowFrom and AllowTo.
	Isolate bool `json:"isolate,omitempty"`
	// AllowFrom closes what others begin, but for its rules; AllowTo what the attachment begins. See ParseRule.
	AllowFrom []string `json:"allow_from,omitempty"`
	AllowTo   []string `json:"allow_to,omitempty"`
	// Egress is what of the outside is reached: "allow" (the default), "deny", or networks in CIDR form.
	Egress []string `json:"egress,omitempty"`
	// HostAccess is ports of the gateway's address that lead to the host's loopback.
	HostAccess []int `json:"host_access,omitempty"`
}

const (
	egressAllow = "allow"
	egressDeny  = "deny"

	maxRules     = 256 // in each list: they are looked through when a flow begins
	maxHostPorts = 256
	dnsPort      = 53
)

// Rule lets flows with others begin.
type Rule struct {
	Prefix      netip.Prefix // of the others; nothing beyond its length
	First, Last uint16       // ports that TCP and UDP go to, both 0 for all
	Proto       string       // tcp, udp, icmp (of either family), or "" for all; with ports, "" is tcp and udp
}

const ruleForm = "write CIDR[:PORT[-PORT]][/tcp|udp|icmp], as 10.213.7.0/24:443/tcp, 10.213.7.5:8000-8010 or [fd00:5::/64]:53/udp"

// ParseRule reads CIDR[:PORT[-PORT]][/tcp|udp|icmp], where CIDR may be one address. IPv6 stands in brackets where a port follows. Errors
// have CodeInvalid.
func ParseRule(s string) (Rule, error) {
	var r Rule
	rest := s
	if i := strings.LastIndexByte(s, '/'); i >= 0 && !startsWithDigit(s[i+1:]) {
		rest, r.Proto = s[:i], s[i+1:]
		if !slices.Contains([]string{"tcp", "udp", "icmp"}, r.Proto) {
			return Rule{}, Errorf(CodeInvalid, "rule %q: %q is not a protocol: %s", clip(s), clip(r.Proto), ruleForm)
		}
	}
	cidr, ports, hasPorts := rest, "", false
	if inside, ok := strings.CutPrefix(rest, "["); ok {
		var after string
		if cidr, after, ok = strings.Cut(inside, "]"); !ok || after != "" && after[0] != ':' {
			return Rule{}, Errorf(CodeInvalid, "rule %q: %s", clip(s), ruleForm)
		}
		ports, hasPorts = strings.CutPrefix(after, ":")
	} else if strings.Count(rest, ":") == 1 {
		cidr, ports, hasPorts = strings.Cut(rest, ":")
	}
	var err error
	if r.Prefix, err = parseCIDR(cidr); err != nil {
		return Rule{}, Errorf(CodeInvalid, "rule %q: %w: %s", clip(s), err, ruleForm)
	}
	if !hasPorts {
		return r, nil
	}
	if r.Proto == "icmp" {
		return Rule{}, Errorf(CodeInvalid, "rule %q: icmp has no ports: leave out %q", clip(s), clip(":"+ports))
	}
	first, last, isRange := strings.Cut(ports, "-")
	if !isRange {
		last = first
	}
	var ok1, ok2 bool
	r.First, ok1 = parsePort(first)
	r.Last, ok2 = parsePort(last)
	if !ok1 || !ok2 || r.First > r.Last {
		return Rule{}, Errorf(CodeInvalid, "rule %q: %q is neither a port, 1 to 65535, nor a range of ports: %s", clip(s), clip(ports), ruleForm)
	}
	return r, nil
}

// String is the rule as ParseRule reads it.
func (r Rule) String() string {
	s := r.Prefix.String()
	if r.Last != 0 {
		if r.Prefix.Addr().Is6() {
			s = "[" + s + "]"
		}
		s += ":" + strconv.Itoa(int(r.First))
		if r.Last != r.First {
			s += "-" + strconv.Itoa(int(r.Last))
		}
	}
	if r.Proto != "" {
		s += "/" + r.Proto
	}
	return s
}

func startsWithDigit(s string) bool { return s != "" && s[0] >= '0' && s[0] <= '9' }

func parsePort(s string) (uint16, bool) {
	if !startsWithDigit(s) {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && n != 0
}

// parseCIDR reads a network, or an address, which is one of its own.
func parseCIDR(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return netip.Prefix{}, Errorf(CodeInvalid, "%q is not an address or a network in CIDR form", clip(s))
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || p.Addr().Is4In6():
		return netip.Prefix{}, Errorf(CodeInvalid, "%q is not a network in CIDR form", clip(s))
	case p != p.Masked():
		return netip.Prefix{}, Errorf(CodeInvalid, "%s has bits beyond its length: %v is the network, %v the address alone", p, p.Masked(), p.Addr())
	}
	return p, nil
}

// egressWord is "allow", "deny", or "" where there are networks.
func (p Policy) egressWord() string {
	switch {
	case len(p.Egress) == 0, slices.Equal(p.Egress, []string{egressAllow}):
		return egressAllow
	case slices.Equal(p.Egress, []string{egressDeny}):
		return egressDeny
	}
	return ""
}

// EgressNetworks are those that Egress names; all is true where everything is reached. Errors have CodeInvalid.
func (p Policy) EgressNetworks() (networks []netip.Prefix, all bool, err error) {
	switch p.egressWord() {
	case egressAllow:
		return nil, true, nil
	case egressDeny:
		return nil, false, nil
	}
	if len(p.Egress) > maxRules {
		return nil, false, Errorf(CodeInvalid, "--egress has %d networks: the most is %d, join neighbours", len(p.Egress), maxRules)
	}
	for _, s := range p.Egress {
		if s == egressAllow || s == egressDeny {
			return nil, false, Errorf(CodeInvalid, "--egress has %q beside something else: give it alone, or networks alone (everything that is not listed is denied)", s)
		}
		network, err := parseCIDR(s)
		if err != nil {
			return nil, false, Errorf(CodeInvalid, "--egress: %w: give allow, deny, or networks as 192.0.2.0/24,2001:db8::/32", err)
		}
		networks = append(networks, network)
	}
	return networks, false, nil
}

// Rules reads AllowFrom and AllowTo. Errors have CodeInvalid.
func (p Policy) Rules() (from, to []Rule, err error) {
	if from, err = parseRules("--allow-from", p.AllowFrom); err != nil {
		return nil, nil, err
	}
	to, err = parseRules("--allow-to", p.AllowTo)
	return from, to, err
}

func parseRules(flag string, list []string) ([]Rule, error) {
	if len(list) > maxRules {
		return nil, Errorf(CodeInvalid, "%s has %d rules: the most is %d, join neighbours", flag, len(list), maxRules)
	}
	var rules []Rule
	for _, s := range list {
		r, err := ParseRule(s)
		if err != nil {
			return nil, Errorf(CodeInvalid, "%s: %w", flag, err)
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// Validate checks the words. Its errors have CodeInvalid.
func (p Policy) Validate() error {
	if _, _, err := p.Rules(); err != nil {
		return err
	}
	if _, _, err := p.EgressNetworks(); err != nil {
		return err
	}
	if len(p.HostAccess) > maxHostPorts {
		return Errorf(CodeInvalid, "--host-access has %d ports: the most is %d; `up --host-loopback` opens all to every container", len(p.HostAccess), maxHostPorts)
	}
	for _, port := range p.HostAccess {
		switch {
		case port < 1 || port > 65535:
			return Errorf(CodeInvalid, "--host-access: %d is not a port: give 1 to 65535", port)
		case port == dnsPort:
			return Errorf(CodeInvalid, "--host-access: port %d of the gateway is the resolver's: have the host's service listen on another port", port)
		}
	}
	return nil
}

// checkGateway refuses a policy for a namespace that has the whole subnet, whose containers nobody here can tell apart.
func (p Policy) checkGateway() error {
	for _, f := range []struct {
		flag  string
		given bool
	}{
		{"--isolate", p.Isolate}, {"--allow-from", len(p.AllowFrom) > 0}, {"--allow-to", len(p.AllowTo) > 0},
		{"--egress", len(p.Egress) > 0}, {"--host-access", len(p.HostAccess) > 0},
	} {
		if f.given {
			return Errorf(CodeInvalid, "%s is given to the gateway of the whole subnet: leave it out, its containers are the engine's to keep apart (or attach them one by one, without --gateway)", f.flag)
		}
	}
	return nil
}

// Summary is the policy in a few words, "" for the default: "isolate, from 2, egress deny, host 5432".
func (p Policy) Summary() string {
	var words []string
	if p.Isolate {
		words = append(words, "isolate")
	}
	if n := len(p.AllowFrom); n > 0 {
		words = append(words, "from "+strconv.Itoa(n))
	}
	if n := len(p.AllowTo); n > 0 {
		words = append(words, "to "+strconv.Itoa(n))
	}
	switch w := p.egressWord(); {
	case w == egressDeny:
		words = append(words, "egress deny")
	case w == "":
		words = append(words, "egress "+strconv.Itoa(len(p.Egress)))
	}
	if len(p.HostAccess) > 0 {
		ports := make([]string, len(p.HostAccess))
		for i, port := range p.HostAccess {
			ports[i] = strconv.Itoa(port)
		}
		words = append(words, "host "+strings.Join(ports, "+"))
	}
	return strings.Join(words, ", ")
}
