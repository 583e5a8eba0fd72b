// This file is the host as the checks see it: one field for each thing that is read, so that a test can put another in
// its place.

package doctor

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/engine/dockerlink"
	"github.com/rootless-ovl/rootless-ovl/internal/cage"
	"github.com/rootless-ovl/rootless-ovl/internal/hostnet"
)

type host struct {
	readFile func(path string) ([]byte, error)
	stat     func(path string) (fs.FileInfo, error)
	openTun  func() error                  // opens /dev/net/tun and closes it again
	hasCap   func(path string) bool        // has the file capabilities?
	getenv   func(string) string           //
	lookPath func(string) (string, error)  //
	user     func() (name string, uid int) //
	groups   func() []int                  // effective gid and the supplementary ones
	overlaps func(netip.Prefix) ([]hostnet.Overlap, error)
	dial     func(ctx context.Context, network, addr string) (net.Conn, error)
	now      func() time.Time
	// knock sends empty datagrams to a peer's port and returns the error that came back, if any.
	knock func(ctx context.Context, peer netip.AddrPort, wait time.Duration) error
	// mtu is that of the interface that leads to a peer, in bytes of IP packet, whatever is known of the path.
	mtu  func(peer netip.AddrPort) (int, error)
	view fs.FS // of all files
	// dockerLink tells whether a dockerd of this user runs, and whether it finds the plugin's socket in its own /run.
	dockerLink func(runtimeDir, socket string) (runs, linked bool)
	// kernel is what it has for the daemon's sandbox.
	kernel func() cage.Kernel
	// echo sends one ping of the given size of IP packet, not to be fragmented, and tells whether it was answered.
	echo func(ctx context.Context, peer netip.Addr, size int, wait time.Duration) (bool, error)
}

func realHost() host {
	return host{
		readFile: os.ReadFile,
		stat:     os.Stat,
		openTun: func() error {
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err == nil {
				unix.Close(fd)
			}
			return err
		},
		hasCap: func(path string) bool {
			n, err := unix.Getxattr(path, "security.capability", nil)
			return err == nil && n > 0
		},
		getenv:   os.Getenv,
		lookPath: lookPath,
		user: func() (string, int) {
			uid := os.Geteuid()
			if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
				return u.Username, uid
			}
			return strconv.Itoa(uid), uid
		},
		groups: func() []int {
			gs, _ := os.Getgroups()
			return append(gs, os.Getegid())
		},
		kernel:   cage.OfKernel,
		overlaps: hostnet.Overlaps,
		dial:     (&net.Dialer{}).DialContext,
		now:      time.Now,
		knock:    knock,
		mtu:      interfaceMTU,
		echo:     echo,
		view:     os.DirFS("/"),

		dockerLink: dockerlink.Linked,
	}
}

// lookPath looks where system programs are too: /usr/sbin is not in every user's PATH.
func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/bin", "/usr/sbin", "/sbin", "/usr/local/bin"} {
		if p, err := exec.LookPath(dir + "/" + name); err == nil {
			return p, nil
		}
	}
	return "", exec.ErrNotFound
}

// value is a file's content without the line end; "" if it cannot be read.
func (h host) value(path string) string {
	b, err := h.readFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (h host) exists(path string) bool {
	_, err := h.stat(path)
	return err == nil || !errors.Is(err, fs.ErrNotExist)
}

// install is how this distribution installs a package, which has another name in each family.
func (h host) install(names map[string]string) string {
	ids := ""
	for line := range strings.Lines(h.value("/etc/os-release")) {
		for _, key := range []string{"ID=", "ID_LIKE="} {
			if v, ok := strings.CutPrefix(line, key); ok {
				ids += " " + strings.Trim(strings.TrimSpace(v), `"'`)
			}
		}
	}
	commands := map[string]string{
		"debian": "apt-get install", "ubuntu": "apt-get install", "fedora": "dnf install", "rhel": "dnf install",
		"arch": "pacman -S", "alpine": "apk add", "suse": "zypper install", "opensuse": "zypper install",
	}
	for _, id := range strings.Fields(ids) {
		family := id
		switch id {
		case "ubuntu":
			family = "debian"
		case "rhel", "centos":
			family, id = "fedora", "rhel"
		case "opensuse":
			family = "suse"
		}
		if names[family] != "" && commands[id] != "" {
			return "as root: " + commands[id] + " " + names[family]
		}
	}
	return "install the package that has it (" + names["debian"] + " on Debian and Ubuntu, " + names["fedora"] + " on Fedora)"
}
