// This file finds where docker's own resolver, which every container on a network has, asks for names that it does not know: the name servers
// that dockerd sees, in its mount namespace. The gateway answers there instead, so that a container finds the overlay's names.

package docker

import (
	"bufio"
	"bytes"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxResolvConf = 64 << 10
	maxResolvers  = 8
)

// stub is the only server of a resolv.conf of systemd-resolved's, in whose place docker reads stubFile.
var stub = netip.MustParseAddr("127.0.0.53")

const (
	resolvConf = "etc/resolv.conf"
	stubFile   = "run/systemd/resolve/resolv.conf"
)

// resolversOf are the addresses at which the containers of dockerd, a process, ask; none if they cannot be seen. dockerd itself asks
// loopback addresses, from outside the containers, so those cannot be answered.
func resolversOf(pid int) []string {
	root, err := os.Open("/proc/" + strconv.Itoa(pid) + "/root")
	if err != nil {
		return nil
	}
	defer root.Close()
	return resolversIn(root)
}

// resolversIn are those of a process with that root directory.
func resolversIn(root *os.File) []string {
	servers := nameservers(readIn(root, resolvConf))
	if slices.Equal(servers, []netip.Addr{stub}) {
		servers = nameservers(readIn(root, stubFile))
	}
	if len(servers) == 0 { // what docker falls back on
		servers = []netip.Addr{netip.AddrFrom4([4]byte{8, 8, 8, 8}), netip.AddrFrom4([4]byte{8, 8, 4, 4})}
	}
	var out []string
	for _, s := range servers {
		if !s.IsLoopback() && s.Zone() == "" && !s.IsUnspecified() && len(out) < maxResolvers {
			out = append(out, s.String())
		}
	}
	return out
}

// readIn reads a file below root, whose links lead nowhere else: the process may have made them. What cannot be read is empty.
func readIn(root *os.File, path string) []byte {
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(f, maxResolvConf))
	if err != nil {
		return nil
	}
	return b
}

// nameservers are those of a resolv.conf, each once.
func nameservers(text []byte) []netip.Addr {
	var list []netip.Addr
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && !slices.Contains(list, a.Unmap()) {
			list = append(list, a.Unmap())
		}
	}
	return list
}
