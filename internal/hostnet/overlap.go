// This file finds what the host uses the overlay network for already.

package hostnet

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// resolvConfs are where name servers of the host stand. Behind systemd-resolved the first names only its local stub, and
// the second the servers behind it.
var resolvConfs = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// An Overlap is a destination of the host that lies in the overlay network: containers could not reach it.
type Overlap struct {
	Prefix netip.Prefix // the route's destination, or the name server
	Device string       // of the route; "" for a name server
	File   string       // that names the name server; "" for a route
}

func (o Overlap) String() string {
	if o.File != "" {
		return fmt.Sprintf("name server %v (%s)", o.Prefix.Addr(), o.File)
	}
	if o.Device != "" {
		return fmt.Sprintf("route to %v over %s", o.Prefix, o.Device)
	}
	return fmt.Sprintf("route to %v", o.Prefix)
}

// Overlaps lists the routes of this host, in any table, and the name servers of its resolv.conf that lie in the network.
// Default routes do not count. Routes come first, each once, in the kernel's order.
func Overlaps(overlay netip.Prefix) ([]Overlap, error) {
	n, err := readHost()
	if err != nil {
		return nil, err
	}
	return n.overlaps(overlay, os.ReadFile)
}

func (n network) overlaps(overlay netip.Prefix, read func(string) ([]byte, error)) ([]Overlap, error) {
	overlay = overlay.Masked()
	var found []Overlap
	add := func(o Overlap) {
		if !slices.Contains(found, o) {
			found = append(found, o)
		}
	}
	for _, r := range n.routes {
		if r.dst.Bits() == 0 || !r.dst.Overlaps(overlay) {
			continue
		}
		o := Overlap{Prefix: r.dst}
		if i, ok := n.byIndex(r.index); ok {
			o.Device = i.name
		}
		add(o)
	}
	var servers []netip.Addr
	for _, file := range resolvConfs {
		b, err := read(file)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("name servers: %w", err)
		}
		for _, a := range nameServers(b) {
			if overlay.Contains(a) && !slices.Contains(servers, a) {
				servers = append(servers, a)
				add(Overlap{Prefix: netip.PrefixFrom(a, a.BitLen()), File: file})
			}
		}
	}
	return found, nil
}

// nameServers reads the nameserver lines of a resolv.conf; what is no address is skipped, as the C library does.
func nameServers(b []byte) []netip.Addr {
	var all []netip.Addr
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			all = append(all, a.Unmap().WithZone(""))
		}
	}
	return all
}
