// This file looks at network namespaces by the processes that are in them, without entering any.

package ocihook

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// firstInterface is what engines and the daemon call a container's first interface.
const firstInterface = "eth0"

// besideInterface is what ours is called beside another network.
const besideInterface = "ovl0"

// netnsOf is the inode of a process's network namespace.
func (h *Hook) netnsOf(process string) (uint64, error) {
	name := filepath.Join(h.proc, process, "ns", "net")
	link, err := os.Readlink(name)
	if err != nil {
		return 0, fmt.Errorf("the network namespace of process %s: %w", process, err)
	}
	number, found := strings.CutPrefix(link, "net:[")
	number, closed := strings.CutSuffix(number, "]")
	inode, err := strconv.ParseUint(number, 10, 64)
	if !found || !closed || err != nil {
		return 0, api.Errorf(api.CodeInternal, "%s leads to %q: the kernel has no network namespaces there; is /proc mounted?", name, clip(link))
	}
	return inode, nil
}

// isIn tells whether a process is in the network namespace with that inode. Another may have the number of one that has ended.
func (h *Hook) isIn(pid int, inode uint64) bool {
	its, err := h.netnsOf(strconv.Itoa(pid))
	return err == nil && its == inode
}

// hasNetwork tells whether the engine has given the process's namespace a network already: the interface that would be ours, or a
// default route. Other interfaces may be the kernel's, which makes some in every namespace.
func (h *Hook) hasNetwork(pid int) (bool, error) {
	for _, look := range []struct {
		name string
		is   func(fields []string) bool
	}{
		{"dev", func(f []string) bool { return strings.HasPrefix(f[0], firstInterface+":") }},
		{"route", func(f []string) bool { return len(f) > 7 && f[1] == "00000000" && f[7] == "00000000" }},
		{"ipv6_route", func(f []string) bool {
			// Every namespace has a route of this length over lo, which refuses.
			return len(f) > 9 && strings.Trim(f[0], "0") == "" && f[1] == "00" && f[9] != "lo"
		}},
	} {
		b, err := os.ReadFile(filepath.Join(h.proc, strconv.Itoa(pid), "net", look.name))
		if errors.Is(err, fs.ErrNotExist) && look.name == "ipv6_route" { // a kernel without IPv6
			continue
		}
		if err != nil {
			return false, fmt.Errorf("the network of process %d: %w", pid, err)
		}
		for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
			if f := strings.Fields(lines.Text()); len(f) > 0 && look.is(f) {
				return true, nil
			}
		}
	}
	return false, nil
}
