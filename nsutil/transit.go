// This file is the firewall of a namespace that has a whole subnet behind its TAP: what comes in over the TAP is let through to the
// bridge, and what leaves the overlay is masqueraded, as flannel does on a host (pkg/trafficmngr). It speaks nfnetlink, since the
// namespace may have no nft or iptables program, and the daemon does not run programs there.
//
//	table ip filter                 the one of iptables, where a container engine may have set the policy of FORWARD to drop
//	    chain DOCKER-USER           iifname TAP accept: dockerd has FORWARD go there first, whether it starts before or after us
//	    chain FORWARD               iifname TAP accept: without dockerd, or with one before 17.06, which drops by the policy alone
//	table ip rootless-ovl-TAP       ours alone
//	    chain postrouting           nat, priority srcnat
//
// A drop in any chain is final in nftables and an accept is not, so the accept must be in the engine's own table. It comes after the rules that
// are there, so that those of the user have the last word; but before a return without a condition, which dockerd puts last in DOCKER-USER and
// behind which nothing is reached. What the user inserts later comes before it, and where it is it stays when it is asked for again.
//
// The rules are those that `iptables -A CHAIN -i TAP -m comment --comment rootless-ovl-TAP -j ACCEPT` makes, or iptables would refuse to
// read the table; by the comment they are found again. Two nodes may have a TAP each in one namespace.
//
// Sources: include/uapi/linux/netfilter/nf_tables.h, net/netfilter/nf_tables_api.c, iptables/nft-shared.c and nft-ipv4.c.

package nsutil

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Transit is what a namespace has to let through.
type Transit struct {
	IfName  string       // the TAP
	Network netip.Prefix // of the overlay, IPv4
	Subnet  netip.Prefix // of Network, what is behind the namespace
	// Masquerade: what Subnet sends out of Network gets the namespace's own address, as does what it sends into Network from other
	// addresses than the overlay's.
	Masquerade bool
}

const (
	filterTable, forwardChain, userChain = "filter", "FORWARD", "DOCKER-USER"
	postroutingChain                     = "postrouting"

	priorityFilter, prioritySrcNAT = 0, 100

	nfAccept = 1 // NF_ACCEPT, linux/netfilter.h
)

// ruleTries is how often rules are changed that somebody else, dockerd say, changes at the same time.
const ruleTries = 5

// mark is the comment of the rules of a TAP in a table of others, and the name of the table that is ours.
func mark(ifName string) string { return "rootless-ovl-" + ifName }

// AllowTransit makes the rules that are not there yet.
func (n *Namespace) AllowTransit(t Transit) error {
	if err := checkIfName(t.IfName); err != nil {
		return err
	}
	for _, p := range []netip.Prefix{t.Network, t.Subnet} {
		if !p.IsValid() || !p.Addr().Is4() || p.Masked() != p {
			return fail(ErrInvalid, nil, "%v is not an IPv4 network", p)
		}
	}
	return n.netfilter(func(c *nftables) error {
		return errors.Join(
			wrapped(c.accept(t.IfName), "letting through what comes in over %s", t.IfName),
			wrapped(c.masquerade(t), "masquerading what %v sends out of the overlay", t.Subnet))
	})
}

// ForbidTransit removes the rules of AllowTransit for the TAP of that name. A chain or table that is not ours alone stays.
func (n *Namespace) ForbidTransit(ifName string) error {
	if err := checkIfName(ifName); err != nil {
		return err
	}
	return n.netfilter(func(c *nftables) error {
		err := wrapped(c.forget(ifName), "removing rules")
		// Refused where others use it.
		if derr := c.batch(c.chain(unix.NFT_MSG_DELCHAIN, unix.NLM_F_NONREC, filterTable, userChain)); !errors.Is(derr, unix.ENOENT) && !errors.Is(derr, unix.EBUSY) {
			err = errors.Join(err, derr)
		}
		return err
	})
}

// netfilter calls do with a socket in the namespace.
func (n *Namespace) netfilter(do func(*nftables) error) error {
	in, err := n.enterFor(wish{talks: unix.NETLINK_NETFILTER})
	if err != nil {
		return err
	}
	defer unix.Close(in.netlink)
	return wrapped(do(&nftables{newRTNL(in.netlink)}), "%s: firewall", n.name)
}

func wrapped(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
}

// nftables makes requests for rules of IPv4 in the namespace of its socket.
type nftables struct{ *rtnl }

// again does what reads rules and changes them by what it has read, until nobody else has changed them in between.
func again(change func() error) error {
	var err error
	for range ruleTries {
		// EEXIST: a chain that was not there; ENOENT: a chain or rule that was.
		if err = change(); !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return err
}

// accept makes the rules that let through what comes in over a device.
func (c *nftables) accept(ifName string) error {
	return again(func() error {
		var b []*nl.NetlinkRequest
		for _, name := range []string{forwardChain, userChain} {
			there, err := c.hasChain(filterTable, name)
			if err != nil {
				return err
			}
			var old []mainRule
			if there {
				if old, err = c.mainRules(name, ifName); err != nil {
					return err
				}
			} else {
				var attrs []*nl.RtAttr
				if name == forwardChain {
					attrs = base("filter", unix.NF_INET_FORWARD, priorityFilter)
				}
				b = append(b, c.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, filterTable),
					c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE|unix.NLM_F_EXCL, filterTable, name, attrs...))
			}
			b = append(b, c.placed(name, ifName, old)...)
		}
		if len(b) == 0 {
			return nil
		}
		return c.batch(b...)
	})
}

// placed are the requests that make our accept of a chain out of what is there: one, which is reached.
func (c *nftables) placed(chain, ifName string, old []mainRule) (b []*nl.NetlinkRequest) {
	var end []byte // handle of the rule behind which nothing is reached
	there := false
	for _, r := range old {
		switch {
		case !r.ours:
			if end == nil {
				end = r.handle
			}
		case end != nil || there:
			b = append(b, c.withoutRule(chain, r.handle))
		default:
			there = true
		}
	}
	if there {
		return b
	}
	flags := unix.NLM_F_CREATE // before the rule of NFTA_RULE_POSITION
	if end == nil {
		flags |= unix.NLM_F_APPEND
	}
	rule := c.rule(flags, filterTable, chain, mark(ifName),
		slices.Concat(meta(unix.NFT_META_IIFNAME), compare(unix.NFT_CMP_EQ, nl.ZeroTerminated(ifName)), expr("counter"), verdict(nfAccept)))
	if end != nil {
		rule.AddData(nl.NewRtAttr(unix.NFTA_RULE_POSITION, end))
	}
	return append(b, rule)
}

// masquerade makes our own table anew.
func (c *nftables) masquerade(t Transit) error {
	ownTable := mark(t.IfName)
	b := c.withoutTable(ownTable)
	if t.Masquerade {
		const saddr, daddr = 12, 16
		multicast := netip.PrefixFrom(netip.AddrFrom4([4]byte{224}), 4)
		tap := nl.ZeroTerminated(t.IfName)
		b = append(b, c.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, ownTable),
			c.chain(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, ownTable, postroutingChain, base("nat", unix.NF_INET_POST_ROUTING, prioritySrcNAT)...),
			c.rule(unix.NLM_F_CREATE|unix.NLM_F_APPEND, ownTable, postroutingChain, ownTable, slices.Concat(
				within(saddr, t.Subnet, unix.NFT_CMP_EQ), within(daddr, t.Network, unix.NFT_CMP_NEQ), within(daddr, multicast, unix.NFT_CMP_NEQ),
				meta(unix.NFT_META_OIFNAME), compare(unix.NFT_CMP_NEQ, tap), expr("masq"))),
			c.rule(unix.NLM_F_CREATE|unix.NLM_F_APPEND, ownTable, postroutingChain, ownTable, slices.Concat(
				meta(unix.NFT_META_OIFNAME), compare(unix.NFT_CMP_EQ, tap), within(saddr, t.Network, unix.NFT_CMP_NEQ), expr("masq"))))
	}
	return c.batch(b...)
}

// forget removes the rules of a TAP from the table of others, and our own table for it.
func (c *nftables) forget(ifName string) error {
	return again(func() error {
		b := c.withoutTable(mark(ifName))
		for _, chain := range []string{forwardChain, userChain} {
			rules, err := c.mainRules(chain, ifName)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.ours {
					b = append(b, c.withoutRule(chain, r.handle))
				}
			}
		}
		return c.batch(b...)
	})
}

// withoutTable are the requests after which there is no such table: one that is not there cannot be deleted.
func (c *nftables) withoutTable(name string) []*nl.NetlinkRequest {
	return []*nl.NetlinkRequest{
		c.table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, name),
		c.table(unix.NFT_MSG_DELTABLE, 0, name),
	}
}

func (c *nftables) withoutRule(chain string, handle []byte) *nl.NetlinkRequest {
	req := c.ruleRequest(unix.NFT_MSG_DELRULE, 0, filterTable, chain)
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_HANDLE, handle))
	return req
}

// mainRule is one of the rules that matter to us: one of ours, or a return without a condition.
type mainRule struct {
	handle []byte
	ours   bool
}

// mainRules are those of a chain of the filter table, in order; none if there is no such chain.
func (c *nftables) mainRules(chain, ifName string) ([]mainRule, error) {
	ours := userData(mark(ifName))
	// Kernels that do not know the filter list other chains too.
	rules, err := dump(c.rtnl, c.ruleRequest(unix.NFT_MSG_GETRULE, 0, filterTable, chain), func(answer []byte) (mainRule, bool) {
		attrs := attrsOf(answer)
		if unix.ByteSliceToString(attrs[unix.NFTA_RULE_TABLE]) != filterTable || unix.ByteSliceToString(attrs[unix.NFTA_RULE_CHAIN]) != chain {
			return mainRule{}, false
		}
		r := mainRule{handle: bytes.Clone(attrs[unix.NFTA_RULE_HANDLE]), ours: bytes.Equal(attrs[unix.NFTA_RULE_USERDATA], ours)}
		return r, r.ours || returnsAlways(attrs[unix.NFTA_RULE_EXPRESSIONS])
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return rules, wrapped(err, "listing rules")
}

// returnsAlways tells of the expressions of a rule whether they are those of `-j RETURN` alone.
func returnsAlways(exprs []byte) bool {
	list, err := nl.ParseRouteAttr(exprs)
	if err != nil {
		return false
	}
	returns := false
	for _, e := range list {
		attrs := attrsIn(e.Value)
		switch unix.ByteSliceToString(attrs[unix.NFTA_EXPR_NAME]) {
		case "counter":
		case "immediate":
			verdict := attrsIn(attrsIn(attrsIn(attrs[unix.NFTA_EXPR_DATA])[unix.NFTA_IMMEDIATE_DATA])[unix.NFTA_DATA_VERDICT])
			code := verdict[unix.NFTA_VERDICT_CODE]
			returns = len(code) == 4 && int32(binary.BigEndian.Uint32(code)) == unix.NFT_RETURN
		default:
			return false
		}
	}
	return returns
}

func (c *nftables) hasChain(table, name string) (bool, error) {
	_, err := c.do(c.chain(unix.NFT_MSG_GETCHAIN, unix.NLM_F_ACK, table, name))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, wrapped(err, "looking for chain %s", name)
}

// attrsOf are the attributes of an answer, behind its nfgenmsg.
func attrsOf(answer []byte) map[int][]byte {
	if len(answer) < nl.SizeofNfgenmsg {
		return nil
	}
	return attrsIn(answer[nl.SizeofNfgenmsg:])
}

func attrsIn(b []byte) map[int][]byte {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return nil
	}
	found := make(map[int][]byte)
	for _, a := range attrs {
		found[int(a.Attr.Type&^unix.NLA_F_NESTED)] = a.Value
	}
	return found
}

// batch does all of the requests or none.
func (c *nftables) batch(requests ...*nl.NetlinkRequest) error {
	// The subsystem of a batch is in the field for resources, in network order.
	subsystem := nl.Nfgenmsg{ResId: binary.NativeEndian.Uint16([]byte{0, unix.NFNL_SUBSYS_NFTABLES})}
	begin := nl.NewNetlinkRequest(unix.NFNL_MSG_BATCH_BEGIN, 0)
	begin.AddData(&subsystem)
	end := nl.NewNetlinkRequest(unix.NFNL_MSG_BATCH_END, 0)
	end.AddData(&subsystem)
	what := map[uint32]string{begin.Seq: "batch"}
	message := begin.Serialize()
	for i, r := range requests {
		if i == len(requests)-1 {
			r.Flags |= unix.NLM_F_ACK
		}
		what[r.Seq] = fmt.Sprintf("request %d of %d", i+1, len(requests))
		message = append(message, r.Serialize()...)
	}
	message = append(message, end.Serialize()...)
	if err := unix.Sendto(c.fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return wrapped(err, "netlink send")
	}
	// The kernel tells of each that it refuses, in order, and of the last in any case. Without the subsystem it refuses the begin.
	last := requests[len(requests)-1].Seq
	var first error
	for {
		msgs, err := c.receive()
		if err != nil {
			return err
		}
		for _, m := range msgs {
			if _, ours := what[m.Header.Seq]; !ours || m.Header.Type != unix.NLMSG_ERROR {
				continue
			}
			if err := ackError(m); err != nil && first == nil {
				first = wrapped(err, "%s", what[m.Header.Seq])
			}
			if m.Header.Seq == last || m.Header.Seq == begin.Seq {
				return first
			}
		}
	}
}

func (c *nftables) request(kind, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_IPV4})
	return req
}

func (c *nftables) table(kind, flags int, name string) *nl.NetlinkRequest {
	req := c.request(kind, flags)
	req.AddData(nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(name)))
	return req
}

func (c *nftables) chain(kind, flags int, table, name string, attrs ...*nl.RtAttr) *nl.NetlinkRequest {
	req := c.request(kind, flags)
	req.AddData(nl.NewRtAttr(unix.NFTA_CHAIN_TABLE, nl.ZeroTerminated(table)))
	req.AddData(nl.NewRtAttr(unix.NFTA_CHAIN_NAME, nl.ZeroTerminated(name)))
	for _, a := range attrs {
		req.AddData(a)
	}
	return req
}

// base are the attributes of a chain that the kernel itself calls.
func base(kind string, hook, priority uint32) []*nl.RtAttr {
	at := nl.NewRtAttr(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, nil)
	at.AddRtAttr(unix.NFTA_HOOK_HOOKNUM, nl.BEUint32Attr(hook))
	at.AddRtAttr(unix.NFTA_HOOK_PRIORITY, nl.BEUint32Attr(priority))
	return []*nl.RtAttr{at, nl.NewRtAttr(unix.NFTA_CHAIN_TYPE, nl.ZeroTerminated(kind)), nl.NewRtAttr(unix.NFTA_CHAIN_POLICY, nl.BEUint32Attr(nfAccept))}
}

// rule makes a rule of expressions with a comment; without NLM_F_APPEND it is the first.
func (c *nftables) rule(flags int, table, chain, comment string, exprs []*nl.RtAttr) *nl.NetlinkRequest {
	req := c.ruleRequest(unix.NFT_MSG_NEWRULE, flags, table, chain)
	list := nl.NewRtAttr(unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, nil)
	for _, e := range exprs {
		list.AddChild(e)
	}
	req.AddData(list)
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_USERDATA, userData(comment)))
	return req
}

func (c *nftables) ruleRequest(kind, flags int, table, chain string) *nl.NetlinkRequest {
	req := c.request(kind, flags)
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(table)))
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(chain)))
	return req
}

// userData is a comment as nft and iptables keep it: type, length, text.
func userData(comment string) []byte {
	const udataComment = 0 // NFTNL_UDATA_RULE_COMMENT, libnftnl/udata.h
	text := nl.ZeroTerminated(comment)
	return append([]byte{udataComment, byte(len(text))}, text...)
}

// expr is an expression of a rule.
func expr(name string, attrs ...*nl.RtAttr) []*nl.RtAttr {
	e := nl.NewRtAttr(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, nil)
	e.AddRtAttr(unix.NFTA_EXPR_NAME, nl.ZeroTerminated(name))
	data := e.AddRtAttr(unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, nil)
	for _, a := range attrs {
		data.AddChild(a)
	}
	return []*nl.RtAttr{e}
}

// The expressions below hand on what they found in register 1.

func meta(key uint32) []*nl.RtAttr {
	return expr("meta", nl.NewRtAttr(unix.NFTA_META_DREG, nl.BEUint32Attr(unix.NFT_REG_1)), nl.NewRtAttr(unix.NFTA_META_KEY, nl.BEUint32Attr(key)))
}

func compare(op uint32, with []byte) []*nl.RtAttr {
	return expr("cmp", nl.NewRtAttr(unix.NFTA_CMP_SREG, nl.BEUint32Attr(unix.NFT_REG_1)), nl.NewRtAttr(unix.NFTA_CMP_OP, nl.BEUint32Attr(op)),
		value(unix.NFTA_CMP_DATA, with))
}

// within compares an address of the IP header, at that offset, with a prefix.
func within(offset uint32, p netip.Prefix, op uint32) []*nl.RtAttr {
	reg, length := nl.BEUint32Attr(unix.NFT_REG_1), nl.BEUint32Attr(4)
	mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-p.Bits()))
	return slices.Concat(
		expr("payload", nl.NewRtAttr(unix.NFTA_PAYLOAD_DREG, reg), nl.NewRtAttr(unix.NFTA_PAYLOAD_BASE, nl.BEUint32Attr(unix.NFT_PAYLOAD_NETWORK_HEADER)),
			nl.NewRtAttr(unix.NFTA_PAYLOAD_OFFSET, nl.BEUint32Attr(offset)), nl.NewRtAttr(unix.NFTA_PAYLOAD_LEN, length)),
		expr("bitwise", nl.NewRtAttr(unix.NFTA_BITWISE_SREG, reg), nl.NewRtAttr(unix.NFTA_BITWISE_DREG, reg), nl.NewRtAttr(unix.NFTA_BITWISE_LEN, length),
			value(unix.NFTA_BITWISE_MASK, mask), value(unix.NFTA_BITWISE_XOR, make([]byte, 4))),
		compare(op, p.Addr().AsSlice()))
}

func verdict(code uint32) []*nl.RtAttr {
	data := nl.NewRtAttr(unix.NFTA_IMMEDIATE_DATA|unix.NLA_F_NESTED, nil)
	data.AddRtAttr(unix.NFTA_DATA_VERDICT|unix.NLA_F_NESTED, nil).AddRtAttr(unix.NFTA_VERDICT_CODE, nl.BEUint32Attr(code))
	return expr("immediate", nl.NewRtAttr(unix.NFTA_IMMEDIATE_DREG, nl.BEUint32Attr(unix.NFT_REG_VERDICT)), data)
}

func value(attr int, b []byte) *nl.RtAttr {
	a := nl.NewRtAttr(attr|unix.NLA_F_NESTED, nil)
	a.AddRtAttr(unix.NFTA_DATA_VALUE, b)
	return a
}
