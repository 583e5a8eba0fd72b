// This file is what nodes and store have to agree on, with the model and with each other.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

const namesPrefix = prefix + "/rootless-ovl/names/"

// listed is an attachment as the node tells of it.
type listed struct {
	lab.Attachment
	Loose   bool
	Problem string
	Ports   []struct {
		HostPort uint16 `json:"host_port"`
		Proto    string
		Problem  string
	}
}

func (l listed) published() (ports []published) {
	for _, p := range l.Ports {
		ports = append(ports, published{p.HostPort, p.Proto})
	}
	return byPort(ports)
}

func byPort(ports []published) []published {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(a, b published) int {
		if a.proto != b.proto {
			return strings.Compare(a.proto, b.proto)
		}
		return int(a.port) - int(b.port)
	})
	return ports
}

// stored is what the store has below the network's prefix.
func (r *run) stored() (map[string]string, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 10*time.Second)
	defer cancel()
	resp, err := r.client.Get(ctx, prefix+"/", clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, kv := range resp.Kvs {
		found[string(kv.Key)] = string(kv.Value)
	}
	return found, nil
}

// settle waits until everybody agrees, and every member reaches whom it may.
func (r *run) settle() {
	began := time.Now()
	var last []string
	for {
		last = r.disagreements()
		if len(last) == 0 {
			break
		}
		if time.Since(began) > settling {
			r.violation("after %v there is still:\n  %s", settling, strings.Join(last, "\n  "))
		}
		if r.t.Failed() {
			r.violation("while the nodes settled")
		}
		time.Sleep(250 * time.Millisecond)
	}
	agreed := time.Since(began)
	if missing := r.matrix(r.attachedMembers(), settling-min(agreed, settling-20*time.Second)); len(missing) > 0 {
		r.violation("they agree since %v, and do not reach each other:\n  %s", agreed, strings.Join(missing, "\n  "))
	}
	r.settled = max(r.settled, time.Since(began))
	r.say("settled: agreed after %v, all reach each other after %v", agreed.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	r.hurts = nil
	for _, n := range r.nodes {
		r.logged(n)
	}
}

// disagreements is what does not hold just now.
func (r *run) disagreements() []string {
	var wrong []string
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	lists := map[*node][]listed{}
	for _, n := range r.nodes {
		if !n.daemon().Running() {
			r.violation("%s: the daemon has ended by itself", n.Name)
		}
		var st lab.Status
		if err := n.daemon().Get("/v1/status", &st); err != nil {
			bad("%s: %v", n.Name, err)
			continue
		}
		if st.State != "ready" || st.Problem != "" || !st.Store.Connected || st.Peers != hosts-1 ||
			st.Subnet != n.subnet.String() || st.NodeID != n.id || st.PublicIP != n.Addr.String() {
			bad("%s: status %s %q, store connected %v %q, %d peers, %s of %s, public %s; expected %s at %s", n.Name, st.State, st.Problem,
				st.Store.Connected, st.Store.Error, st.Peers, st.Subnet, st.NodeID, st.PublicIP, n.subnet, n.Addr)
		}
		var list []listed
		if err := n.daemon().Get("/v1/attachments", &list); err != nil {
			bad("%s: %v", n.Name, err)
			continue
		}
		lists[n] = list
		if st.Attachments != len(list) {
			bad("%s: status has %d attachments, the list %d", n.Name, st.Attachments, len(list))
		}
		for _, text := range r.peersWrong(n) {
			bad("%s: %s", n.Name, text)
		}
		if text := n.subnetEnvWrong(st); text != "" {
			bad("%s: %s", n.Name, text)
		}
	}
	if len(wrong) > 0 {
		return wrong
	}
	stored, err := r.stored()
	if err != nil {
		return []string{"the store: " + err.Error()}
	}
	for _, n := range r.nodes {
		r.adopt(n, lists[n])
		wrong = append(wrong, r.listWrong(n, lists[n])...)
	}
	wrong = append(wrong, r.storeWrong(stored)...)
	r.bury(lists, stored)
	return wrong
}

// adopt makes the model of an unsure member what its node says, if it has said so for a while.
func (r *run) adopt(n *node, list []listed) {
	for _, m := range r.members {
		if m.node != n || !m.unsure {
			continue
		}
		now := sighting{}
		for _, l := range list {
			if l.Inode == m.ns {
				now = sighting{name: l.Name, addr: l.Addr, ifName: l.IfName, ports: l.published(), there: true}
			}
		}
		if m.seen == nil || !reflect.DeepEqual(m.seen.sighting, now) {
			m.seen = &seen{now, time.Now()}
			continue
		}
		if time.Since(m.seen.since) < 2*time.Second {
			continue
		}
		m.unsure, m.seen = false, nil
		if m.attached && !now.there {
			r.gone(m)
			r.drop(m)
		}
		m.attached, m.name, m.ports = now.there, now.name, now.ports
		if now.there {
			addr, err := netip.ParsePrefix(now.addr)
			if err != nil || addr.Masked() != n.subnet {
				r.violation("%s: %s has the address %q, %v", n.Name, now.name, now.addr, err)
			}
			m.addr, m.ifName, m.since = addr.Addr(), now.ifName, r.round
		}
		r.say("adopted: %s %s", m.id, m)
	}
}

// sighting is what a node says of a member; seen is since when.
type sighting struct {
	name, addr, ifName string
	ports              []published
	there              bool
}

type seen struct {
	sighting
	since time.Time
}

// listWrong holds a node's list against the model.
func (r *run) listWrong(n *node, list []listed) (wrong []string) {
	bad := func(format string, args ...any) { wrong = append(wrong, n.Name+": "+fmt.Sprintf(format, args...)) }
	byNS := map[uint64]*member{}
	for _, m := range r.members {
		if m.node == n {
			byNS[m.ns] = m
		}
	}
	for _, l := range list {
		m := byNS[l.Inode]
		if m != nil && m.attached && !m.unsure && m.name == l.Name {
			if l.Addr != netip.PrefixFrom(m.addr, n.subnet.Bits()).String() || l.Problem != "" || l.IfName != m.ifName {
				bad("%s is listed as %+v, expected %s", m.id, l, m)
			}
			if got, want := l.published(), byPort(m.ports); !slices.Equal(got, want) {
				bad("%s has the ports %v, expected %v", m.id, got, want)
			}
			for _, p := range l.Ports {
				if p.Problem != "" {
					bad("%s: port %d: %s", m.id, p.HostPort, p.Problem)
				}
			}
			delete(byNS, l.Inode)
			continue
		}
		if m != nil && m.unsure {
			bad("%s is unsure, listed as %s %s", m.id, l.Name, l.Addr)
			delete(byNS, l.Inode)
			continue
		}
		if d := slices.IndexFunc(r.dying, func(d dying) bool { return d.node == n && d.name == l.Name }); m == nil && d >= 0 && time.Now().Before(r.dying[d].until) {
			continue
		}
		bad("nobody should be attached as %+v", l)
	}
	for _, m := range byNS {
		switch {
		case m.unsure:
			bad("%s is unsure, not listed", m.id)
		case m.attached:
			bad("%s is not listed: %s", m.id, m)
		}
	}
	return wrong
}

// peersWrong holds a node's peers against the other nodes.
func (r *run) peersWrong(n *node) (wrong []string) {
	var peers []struct {
		NodeID   string `json:"node_id"`
		Subnet   string
		PublicIP string `json:"public_ip"`
		Problem  string
	}
	if err := n.daemon().Get("/v1/peers", &peers); err != nil {
		return []string{err.Error()}
	}
	for _, o := range r.nodes {
		i := slices.IndexFunc(peers, func(p struct {
			NodeID   string `json:"node_id"`
			Subnet   string
			PublicIP string `json:"public_ip"`
			Problem  string
		}) bool {
			return p.NodeID == o.id
		})
		switch {
		case o == n && i >= 0:
			wrong = append(wrong, "it is its own peer")
		case o != n && i < 0:
			wrong = append(wrong, o.Name+" is not a peer")
		case o != n && (peers[i].Subnet != o.subnet.String() || peers[i].PublicIP != o.Addr.String() || peers[i].Problem != ""):
			wrong = append(wrong, fmt.Sprintf("the peer %s is %+v, expected %s at %s", o.Name, peers[i], o.subnet, o.Addr))
		}
	}
	if len(peers) != hosts-1 {
		wrong = append(wrong, fmt.Sprintf("peers %+v", peers))
	}
	return wrong
}

// subnetEnvWrong holds subnet.env against the status; "" is right.
func (n *node) subnetEnvWrong(st lab.Status) string {
	b, err := os.ReadFile(filepath.Join(n.daemon().RuntimeDir, "subnet.env"))
	if err != nil {
		return err.Error()
	}
	want := fmt.Sprintf("FLANNEL_NETWORK=%s\nFLANNEL_SUBNET=%s/%d\nFLANNEL_MTU=%d\nFLANNEL_IPMASQ=true\n", network, n.subnet.Addr().Next(), n.subnet.Bits(), st.MTU)
	if string(b) != want {
		return fmt.Sprintf("subnet.env is %q, expected %q", b, want)
	}
	return ""
}

// storeWrong holds the store against the model: a lease for each node, a key for each name.
func (r *run) storeWrong(stored map[string]string) (wrong []string) {
	bad := func(format string, args ...any) {
		wrong = append(wrong, "the store: "+fmt.Sprintf(format, args...))
	}
	left := map[string]string{}
	for key, value := range stored {
		if key != prefix+"/config" {
			left[key] = value
		}
	}
	for _, n := range r.nodes {
		var lease struct {
			PublicIP    string
			RootlessOvl struct{ NodeID string }
		}
		value, ok := left[n.key()]
		if err := json.Unmarshal([]byte(value), &lease); !ok || err != nil || lease.PublicIP != n.Addr.String() || lease.RootlessOvl.NodeID != n.id {
			bad("the lease of %s is %q, expected %s at %s", n.Name, value, n.id, n.Addr)
		}
		delete(left, n.key())
	}
	for _, m := range r.members {
		key := namesPrefix + m.name
		if m.unsure {
			delete(left, key)
			continue
		}
		if !m.attached {
			continue
		}
		var name struct{ NodeID, Addr string }
		value, ok := left[key]
		if err := json.Unmarshal([]byte(value), &name); !ok || err != nil || name.NodeID != m.node.id || name.Addr != m.addr.String() {
			bad("the name %s of %s is %q, expected %s on %s", m.name, m.id, value, m.addr, m.node.id)
		}
		delete(left, key)
	}
	for _, d := range r.dying {
		if time.Now().Before(d.until) {
			delete(left, namesPrefix+d.name)
		}
	}
	for key, value := range left {
		bad("nobody should have %s = %s", key, value)
	}
	return wrong
}

// bury forgets attachments whose end everybody has noticed.
func (r *run) bury(lists map[*node][]listed, stored map[string]string) {
	r.dying = slices.DeleteFunc(r.dying, func(d dying) bool {
		if d.name == "" {
			return true
		}
		owned := slices.ContainsFunc(r.members, func(m *member) bool { return m.attached && m.name == d.name })
		_, there := stored[namesPrefix+d.name]
		return owned || !there && !slices.ContainsFunc(lists[d.node], func(l listed) bool { return l.Name == d.name })
	})
}

func (r *run) attachedMembers() (of []*member) {
	for _, m := range r.members {
		if m.attached && !m.unsure {
			of = append(of, m)
		}
	}
	return of
}
