// Tests of TAPs in real namespaces, made without a capability.

package nsutil

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testConfig() TAPConfig {
	return TAPConfig{
		IfName:     "eth0",
		MAC:        [6]byte{0x02, 0x42, 0x0a, 0x05, 0x01, 0x02},
		MTU:        1422,
		TxQueueLen: 10000,
		Addrs:      []netip.Prefix{netip.MustParsePrefix("10.5.1.2/24"), netip.MustParsePrefix("fd00:5:1::2/64")},
		Routes: []Route{
			{Dst: netip.MustParsePrefix("10.5.0.0/16"), Gateway: netip.MustParseAddr("10.5.1.1"), MTU: 1400},
			{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("10.5.1.1")},
			{Dst: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fd00:5:1::1"), MTU: 1380},
		},
		GSOMaxSegs: 44,
		GSOMaxSize: 65000,
		Persist:    true,
	}
}

func open(t testing.TB, pid int) *Namespace {
	t.Helper()
	n, err := OpenPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestProcess_IsUnprivileged(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Fatal("these tests prove nothing as root")
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), "CapEff:\t0000000000000000\n") || !strings.Contains(string(b), "CapPrm:\t0000000000000000\n") {
		t.Fatal("these tests prove nothing with a capability")
	}
}

func TestCreateTAP_MakesDeviceAsAsked(t *testing.T) {
	for _, m := range mappings {
		for _, queues := range []int{1, 3} {
			t.Run(fmt.Sprintf("%s, %d queues", m.name, queues), func(t *testing.T) {
				h := startHolder(t, m)
				c := testConfig()
				c.Queues = queues
				tap, err := open(t, h.pid).CreateTAP(c)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = tap.Delete() }()

				checkDevice(t, h)
				if len(tap.Files) != queues || tap.IfName != "eth0" || tap.MAC != c.MAC {
					t.Errorf("TAP is %d files, %s, %x", len(tap.Files), tap.IfName, tap.MAC)
				}
				if lo := h.links()["lo"]; !slices.Contains(lo.Flags, "UP") {
					t.Errorf("lo is not up: %v", lo.Flags)
				}
				for _, f := range tap.Files {
					checkQueue(t, f, queues > 1)
				}
				own, err := pathInode("/proc/self/ns/net")
				if err != nil {
					t.Fatal(err)
				}
				if n := open(t, h.pid); n.Inode() == own || n.Inode() == 0 {
					t.Errorf("namespace %d, our own is %d", n.Inode(), own)
				}
			})
		}
	}
}

// checkDevice asserts what testConfig asks for, as seen from inside.
func checkDevice(t *testing.T, h *holder) {
	t.Helper()
	l, ok := h.links()["eth0"]
	if !ok {
		t.Fatal("no eth0 in the namespace")
	}
	if l.MTU != 1422 || l.Address != "02:42:0a:05:01:02" || l.TxQLen != 10000 || !slices.Contains(l.Flags, "UP") {
		t.Errorf("eth0 is %+v", l)
	}
	if d := h.details("eth0"); d.GenMode != "none" || d.GSOMaxSegs != 44 || d.GSOMaxSize != 65000 {
		t.Errorf("eth0 is %+v", d)
	}
	var addrs []string
	for _, a := range l.AddrInfo {
		addrs = append(addrs, fmt.Sprintf("%s/%d", a.Local, a.PrefixLen))
		if a.Tentative {
			t.Errorf("%s waits for duplicate address detection", a.Local)
		}
	}
	if want := []string{"10.5.1.2/24", "fd00:5:1::2/64"}; !slices.Equal(addrs, want) {
		t.Errorf("addresses %v, want %v", addrs, want)
	}
	r4, r6 := h.routes("-4"), h.routes("-6")
	if r := r4["default"]; r.Gateway != "10.5.1.1" || r.Dev != "eth0" {
		t.Errorf("default route %+v", r)
	}
	if r := r4["10.5.0.0/16"]; r.Gateway != "10.5.1.1" || len(r.Metrics) != 1 || r.Metrics[0]["mtu"] != 1400 {
		t.Errorf("overlay route %+v", r)
	}
	if r := r6["default"]; r.Gateway != "fd00:5:1::1" || len(r.Metrics) != 1 || r.Metrics[0]["mtu"] != 1380 {
		t.Errorf("IPv6 default route %+v", r)
	}
}

// checkQueue asserts flags of the descriptor and of the file behind it.
func checkQueue(t *testing.T, f *os.File, multi bool) {
	t.Helper()
	ifr, err := unix.NewIfreq("")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlIfreq(int(f.Fd()), unix.TUNGETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	want := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		want |= unix.IFF_MULTI_QUEUE
	}
	const mask = unix.IFF_TAP | unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
	if got := ifr.Uint16() & mask; got != want {
		t.Errorf("flags %#x, want %#x", got, want)
	}
	if fl, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || fl&unix.O_NONBLOCK == 0 {
		t.Errorf("descriptor flags %#x, %v: not non-blocking", fl, err)
	}
	if fl, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || fl&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor is not close-on-exec (%#x, %v)", fl, err)
	}
	var b [2048]byte
	if _, err := unix.Read(int(f.Fd()), b[:]); err != nil && !errors.Is(err, unix.EAGAIN) {
		t.Errorf("read: %v", err)
	}
}

func TestCreateTAP_PathOpensTheSameNamespace(t *testing.T) {
	h := startHolder(t, mappings[0])
	n, err := OpenPath(fmt.Sprintf("/proc/%d/ns/net", h.pid))
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if n.Inode() != open(t, h.pid).Inode() {
		t.Error("path and pid give different namespaces")
	}
	tap, err := n.CreateTAP(TAPConfig{IfName: "tap0", MTU: 1500})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Delete() }()
	if l := h.links()["tap0"]; l.MTU != 1500 || l.Address != macText(tap.MAC) {
		t.Errorf("tap0 is %+v, TAP says MAC %s", l, macText(tap.MAC))
	}
}

func TestCreateTAP_LeavesNothingOnFailure(t *testing.T) {
	h := startHolder(t, mappings[1])
	n := open(t, h.pid)
	good, err := n.CreateTAP(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = good.Delete() }()
	fds := fdCount(t)

	other := testConfig()
	other.IfName = "eth1"
	other.Addrs = []netip.Prefix{netip.MustParsePrefix("10.9.0.2/24")}
	other.Routes = nil
	tests := []struct {
		name   string
		change func(*TAPConfig)
		want   error
		text   string // must be in the error
	}{
		{"name taken", func(c *TAPConfig) { c.IfName = "eth0" }, ErrIfNameTaken, "eth0"},
		{"name taken by lo", func(c *TAPConfig) { c.IfName = "lo" }, ErrIfNameTaken, "--ifname"},
		{"name empty", func(c *TAPConfig) { c.IfName = "" }, ErrIfName, ""},
		{"name too long", func(c *TAPConfig) { c.IfName = "sixteen-letters-" }, ErrIfName, "sixteen"},
		{"name with slash", func(c *TAPConfig) { c.IfName = "a/b" }, ErrIfName, ""},
		{"name is a pattern", func(c *TAPConfig) { c.IfName = "tap%d" }, ErrIfName, ""},
		{"default route there", func(c *TAPConfig) {
			c.Routes = []Route{{Dst: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("10.9.0.1")}}
		}, ErrRouteTaken, "via 10.5.1.1 over eth0"},
		{"IPv6 default route there", func(c *TAPConfig) { c.Routes = []Route{{Dst: netip.MustParsePrefix("::/0")}} }, ErrRouteTaken, "fd00:5:1::1"},
		{"route there", func(c *TAPConfig) { c.Routes = []Route{{Dst: netip.MustParsePrefix("10.5.0.0/16")}} }, ErrRouteTaken, "over eth0): start the container without a network of its own"},
		{"route given twice", func(c *TAPConfig) {
			r := Route{Dst: netip.MustParsePrefix("10.77.0.0/16")}
			c.Routes = []Route{r, r}
		}, ErrRouteTaken, "10.77.0.0/16"},
		{"address given twice", func(c *TAPConfig) { c.Addrs = append(c.Addrs, c.Addrs[0]) }, syscall.EEXIST, "10.9.0.2/24"},
		{"multicast MAC", func(c *TAPConfig) { c.MAC[0] = 1 }, ErrInvalid, "01:42"},
		{"MTU too small", func(c *TAPConfig) { c.MTU = 20 }, ErrInvalid, "20"},
		{"MTU too large", func(c *TAPConfig) { c.MTU = 65535 }, ErrInvalid, "65535"},
		{"too many queues", func(c *TAPConfig) { c.Queues = 65 }, ErrInvalid, "65"},
		{"gateway of the other family", func(c *TAPConfig) {
			c.Routes = []Route{{Dst: netip.MustParsePrefix("10.8.0.0/16"), Gateway: netip.MustParseAddr("::1")}}
		}, ErrInvalid, "family"},
		{"destination with host bits", func(c *TAPConfig) { c.Routes = []Route{{Dst: netip.MustParsePrefix("10.8.0.1/16")}} }, ErrInvalid, ""},
		{"IPv6 without an MTU for it", func(c *TAPConfig) {
			c.MTU = 1000
			c.Addrs = []netip.Prefix{netip.MustParsePrefix("fd00::2/64")}
		}, nil, "fd00::2/64"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := other
			c.Addrs = slices.Clone(other.Addrs)
			tt.change(&c)
			tap, err := n.CreateTAP(c)
			if err == nil {
				_ = tap.Delete()
				t.Fatal("no error")
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("error %q is not %q", err, tt.want)
			}
			if !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q does not name %q in one line", err, tt.text)
			}
			if links := h.links(); len(links) != 2 {
				t.Errorf("devices left behind: %v", links)
			}
		})
	}
	checkDevice(t, h)
	if now := fdCount(t); now > fds { // fewer: the collector has closed what an earlier test let go
		t.Errorf("%d descriptors before, %d after", fds, now)
	}
}

func TestCreateTAP_SaysWhyTunCannotBeOpened(t *testing.T) {
	h := startHolder(t, mappings[1])
	n := open(t, h.pid)
	dir := t.TempDir()
	// Root's: over a file of ours the child has CAP_DAC_OVERRIDE.
	const closed = "/etc/shadow"
	if f, err := os.OpenFile(closed, os.O_RDWR, 0); !errors.Is(err, os.ErrPermission) {
		f.Close()
		t.Skipf("%s is not closed to us: %v", closed, err)
	}
	defer func(old string) { tunPath = old }(tunPath)
	for path, want := range map[string]syscall.Errno{filepath.Join(dir, "absent"): unix.ENOENT, closed: unix.EACCES} {
		tunPath = path
		_, err := n.CreateTAP(testConfig())
		if !errors.Is(err, ErrTunDevice) || !errors.Is(err, want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestTunError_HasARemedyForEachCause(t *testing.T) {
	for errno, remedy := range map[syscall.Errno]string{
		unix.ENOENT: "modprobe tun", unix.ENODEV: "modprobe tun", unix.EACCES: "chmod 0666", unix.EPERM: "--device /dev/net/tun",
	} {
		err := tunError("/dev/net/tun", errno)
		if !errors.Is(err, ErrTunDevice) || !errors.Is(err, errno) || !strings.Contains(err.Error(), remedy) {
			t.Errorf("%v: %v", errno, err)
		}
	}
}

func TestAdoptTAP_TakesUpPersistentDevice(t *testing.T) {
	for _, queues := range []int{1, 2} {
		t.Run(strconv.Itoa(queues)+" queues", func(t *testing.T) {
			h := startHolder(t, mappings[2])
			n := open(t, h.pid)
			c := testConfig()
			c.Queues = queues
			tap, err := n.CreateTAP(c)
			if err != nil {
				t.Fatal(err)
			}
			if err := tap.Close(); err != nil {
				t.Fatal(err)
			}
			if _, ok := h.links()["eth0"]; !ok {
				t.Fatal("a persistent TAP went with its descriptors")
			}
			again, err := n.AdoptTAP("eth0", queues)
			if err != nil {
				t.Fatal(err)
			}
			checkDevice(t, h)
			if again.MAC != c.MAC || len(again.Files) != queues {
				t.Errorf("adopted TAP has MAC %x and %d files", again.MAC, len(again.Files))
			}
			for _, f := range again.Files {
				checkQueue(t, f, queues > 1)
			}
			if queues == 1 {
				if _, err := n.AdoptTAP("eth0", 1); !errors.Is(err, ErrTAPBusy) {
					t.Errorf("adopting a TAP that is held: %v", err)
				}
			}
			if err := again.Delete(); err != nil {
				t.Fatal(err)
			}
			if links := h.links(); len(links) != 1 {
				t.Errorf("left after Delete: %v", links)
			}
		})
	}
}

func TestAdoptTAP_RefusesWhatIsNoTAPOfOurs(t *testing.T) {
	h := startHolder(t, mappings[0])
	n := open(t, h.pid)
	tap, err := n.CreateTAP(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	tap.Close()
	for _, tt := range []struct {
		name   string
		queues int
	}{{"eth1", 1}, {"lo", 1}, {"eth0", 2}} {
		if got, err := n.AdoptTAP(tt.name, tt.queues); !errors.Is(err, ErrNoTAP) {
			t.Errorf("%s with %d queues: %v, %v", tt.name, tt.queues, got, err)
		}
	}
	if links := h.links(); len(links) != 2 {
		t.Errorf("devices are now %v", links)
	}
	if _, err := n.AdoptTAP("a b", 1); !errors.Is(err, ErrIfName) {
		t.Errorf("bad name: %v", err)
	}
}

func TestChangeTAP_AddsWhatADualStackNetworkHas(t *testing.T) {
	h := startHolder(t, mappings[1])
	n := open(t, h.pid)
	after := testConfig()
	before := after
	before.MTU, before.Addrs, before.Routes, before.GSOMaxSize = 1472, after.Addrs[:1], after.Routes[:2], 60000
	tap, err := n.CreateTAP(before)
	if err != nil {
		t.Fatal(err)
	}
	tap.Close() // as when the daemon has stopped
	for range 2 {
		if err := n.ChangeTAP(after); err != nil {
			t.Fatal(err)
		}
		checkDevice(t, h)
	}
	if r := h.routes("-6")["default"]; r.Gateway != "fd00:5:1::1" || r.Dev != "eth0" {
		t.Errorf("IPv6 default route %+v", r)
	}
	if got := len(h.routes("-4")); got != 3 { // with that of the subnet
		t.Errorf("%d IPv4 routes: %v", got, h.routes("-4"))
	}
	// Another network, with another IPv6 address.
	moved := after
	moved.Addrs, moved.OldAddrs = []netip.Prefix{netip.MustParsePrefix("fd00:6:1::9/64")}, after.Addrs[1:]
	moved.OldRoutes = []Route{{Dst: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fd00:5:1::1")}}
	moved.Routes = []Route{{Dst: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fd00:6:1::1")}}
	for range 2 {
		if err := n.ChangeTAP(moved); err != nil {
			t.Fatal(err)
		}
		if r := h.routes("-6")["default"]; r.Gateway != "fd00:6:1::1" {
			t.Errorf("IPv6 default route %+v", r)
		}
		if a := h.run("ip", "-6", "addr", "show", "dev", "eth0"); strings.Contains(a.Out, "fd00:5:1") || !strings.Contains(a.Out, "fd00:6:1::9/64") {
			t.Errorf("addresses: %+v", a)
		}
	}
	for _, name := range []string{"lo", "eth1"} {
		c := after
		c.IfName = name
		if err := n.ChangeTAP(c); !errors.Is(err, ErrNoTAP) {
			t.Errorf("%s: %v", name, err)
		}
	}
	again, err := n.AdoptTAP("eth0", 1)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Delete()
}

func TestChangeTAP_AnAddressOfIPv6IsNotMissedWhereThereIsNoIPv6(t *testing.T) {
	h := startHolder(t, mappings[0])
	n := open(t, h.pid)
	after := testConfig()
	after.MTU = 1000 // too small for IPv6, of which the device has nothing then
	after.OldAddrs, after.Addrs, after.Routes = after.Addrs[1:], after.Addrs[:1], after.Routes[:2]
	tap, err := n.CreateTAP(after)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Delete() }()
	if err := n.ChangeTAP(after); err != nil {
		t.Errorf("got %v", err)
	}
}

func TestChangeTAP_TellsThatIPv6IsSwitchedOff(t *testing.T) {
	h := startHolder(t, mappings[0])
	n := open(t, h.pid)
	after := testConfig()
	before := after
	before.Addrs, before.Routes = after.Addrs[:1], after.Routes[:2]
	tap, err := n.CreateTAP(before)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Delete() }()
	if a := h.run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"); a.Err != "" {
		t.Skipf("IPv6 cannot be switched off here: %s", a.Err)
	}
	if err := n.ChangeTAP(after); !errors.Is(err, ErrNoIPv6) {
		t.Errorf("got %v", err)
	}
}

func TestBridges_ListsBridgesAndTheirIPv4Addresses(t *testing.T) {
	h := startHolder(t, mappings[0])
	n := open(t, h.pid)
	if got, err := n.Bridges(); err != nil || len(got) != 0 {
		t.Fatalf("got %v, %v", got, err)
	}
	for _, argv := range [][]string{
		{"ip", "link", "add", "docker0", "type", "bridge"}, {"ip", "link", "add", "bare0", "type", "bridge"},
		{"ip", "addr", "add", "172.17.0.1/16", "dev", "docker0"}, {"ip", "addr", "add", "10.5.1.1/24", "dev", "docker0"},
		{"ip", "addr", "add", "fd00::1/64", "dev", "docker0"}, {"ip", "addr", "add", "10.9.0.1/24", "dev", "lo"},
	} {
		if a := h.run(argv...); a.Err != "" {
			if argv[1] == "link" {
				t.Skipf("%v: %s", argv, a.Err)
			}
			t.Fatalf("%v: %s", argv, a.Err)
		}
	}
	got, err := n.Bridges()
	if want := "[{docker0 [172.17.0.1/16 10.5.1.1/24]} {bare0 []}]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("got %v, %v, want %s", got, err, want)
	}
}

func TestTAPsInTheWay_FindsWhatCreateTAPWouldRefuse(t *testing.T) {
	h := startHolder(t, mappings[0])
	n := open(t, h.pid)
	c := testConfig()
	tap, err := n.CreateTAP(c)
	if err != nil {
		t.Fatal(err)
	}
	other := testConfig()
	other.IfName, other.Routes, other.Addrs = "eth1", nil, nil
	bystander, err := n.CreateTAP(other)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = bystander.Delete() }()
	inTheWay := func(c TAPConfig) []Device {
		t.Helper()
		got, err := n.TAPsInTheWay(c)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	eth0 := []Device{{IfName: "eth0", MAC: tap.MAC, Up: true}}
	for _, held := range []bool{true, false} {
		byRoute, free := c, c
		byRoute.IfName = "eth2"
		free.IfName, free.Routes = "eth2", []Route{{Dst: netip.MustParsePrefix("10.99.0.0/16")}}
		named := free
		named.IfName = "eth0"
		lo := free
		lo.IfName = "lo"
		if got := inTheWay(c); !slices.Equal(got, eth0) {
			t.Errorf("of the same device, held=%v: %v", held, got)
		}
		if got := inTheWay(byRoute); !slices.Equal(got, eth0) {
			t.Errorf("of the same routes, held=%v: %v", held, got)
		}
		if got := inTheWay(named); !slices.Equal(got, eth0) {
			t.Errorf("of the same name, held=%v: %v", held, got)
		}
		if got := append(inTheWay(free), inTheWay(lo)...); len(got) != 0 {
			t.Errorf("no TAP is in the way, held=%v: %v", held, got)
		}
		tap.Close() // and once more with the device left behind
	}
	again, err := n.AdoptTAP("eth0", 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Delete(); err != nil {
		t.Fatal(err)
	}
	fresh, err := n.CreateTAP(c)
	if err != nil {
		t.Fatalf("after the one in the way was deleted: %v", err)
	}
	_ = fresh.Delete()
}

func TestTAP_GoesWithItsDescriptorsUnlessPersistent(t *testing.T) {
	h := startHolder(t, mappings[1])
	c := testConfig()
	c.Persist = false
	tap, err := open(t, h.pid).CreateTAP(c)
	if err != nil {
		t.Fatal(err)
	}
	tap.Close()
	if links := h.links(); len(links) != 1 {
		t.Errorf("left after Close: %v", links)
	}
	if err := tap.Delete(); err != nil {
		t.Errorf("Delete after Close: %v", err)
	}
}

func TestTAP_DeleteAfterTheNamespaceIsGone(t *testing.T) {
	h := startHolder(t, mappings[0])
	n := open(t, h.pid)
	tap, err := n.CreateTAP(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	n.Close()
	h.stop()
	if err := tap.Delete(); err != nil {
		t.Error(err)
	}
	if _, err := n.CreateTAP(testConfig()); !errors.Is(err, ErrGone) {
		t.Errorf("a closed namespace: %v", err)
	}
}

func TestCreateTAP_LeaksNothingInALoop(t *testing.T) {
	h := startHolder(t, mappings[1])
	cycle := func() {
		n, err := OpenPID(h.pid)
		if err != nil {
			t.Fatal(err)
		}
		e, err := WatchExit(h.pid)
		if err != nil {
			t.Fatal(err)
		}
		tap, err := n.CreateTAP(testConfig())
		if err != nil {
			t.Fatal(err)
		}
		if err := tap.Delete(); err != nil {
			t.Fatal(err)
		}
		e.Close()
		n.Close()
	}
	cycle()
	fds, goroutines, kids := fdCount(t), runtime.NumGoroutine(), len(children(t))
	for range 100 {
		cycle()
	}
	if now := fdCount(t); now != fds {
		t.Errorf("%d descriptors before, %d after", fds, now)
	}
	if now := goroutineCount(goroutines); now > goroutines {
		t.Errorf("%d goroutines before, %d after", goroutines, now)
	}
	if now := len(children(t)); now != kids {
		t.Errorf("%d children before, %d after", kids, now)
	}
	if links := h.links(); len(links) != 1 {
		t.Errorf("devices left behind: %v", links)
	}
}

func TestCreateTAP_ManyAtOnce(t *testing.T) {
	h := startHolder(t, mappings[1])
	n := open(t, h.pid)
	// Work that keeps the collector and the scheduler busy while processes are forked.
	stop := make(chan struct{})
	var busy sync.WaitGroup
	busy.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = make([]byte, 1<<16)
				runtime.Gosched()
			}
		}
	})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			tap, err := n.CreateTAP(TAPConfig{IfName: "tap" + strconv.Itoa(i), MTU: 1400, Persist: true})
			if err != nil {
				t.Error(err)
				return
			}
			if err := tap.Delete(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	close(stop)
	busy.Wait()
	if links := h.links(); len(links) != 1 {
		t.Errorf("devices left behind: %v", links)
	}
}

func TestWatchExit_TellsOfTheEnd(t *testing.T) {
	h := startHolder(t, mappings[1])
	e, err := WatchExit(h.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	select {
	case <-e.Done():
		t.Fatal("a live process has ended")
	default:
	}
	start, err := StartTime(h.pid)
	if err != nil || start == 0 {
		t.Fatalf("start time %d, %v", start, err)
	}
	// Killed but not reaped: a zombie has ended.
	if err := unix.Kill(h.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-e.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the end was not noticed")
	}
	if _, err := StartTime(h.pid); !errors.Is(err, ErrNoProcess) {
		t.Errorf("StartTime of a zombie: %v", err)
	}
	if _, err := OpenPID(h.pid); !errors.Is(err, ErrNoProcess) {
		t.Errorf("OpenPID of a zombie: %v", err)
	}
	z, err := WatchExit(h.pid)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-z.Done():
	case <-time.After(10 * time.Second):
		t.Error("a zombie has not ended")
	}
	z.Close()
	pid := h.pid
	h.stop()
	if _, err := WatchExit(pid); !errors.Is(err, ErrNoProcess) {
		t.Errorf("WatchExit of no process: %v", err)
	}
	if _, err := OpenPID(pid); !errors.Is(err, ErrNoProcess) || !strings.Contains(err.Error(), strconv.Itoa(pid)) {
		t.Errorf("OpenPID of no process: %v", err)
	}
}

func TestExit_CloseEndsTheWatch(t *testing.T) {
	h := startHolder(t, mappings[1])
	e, err := WatchExit(h.pid)
	if err != nil {
		t.Fatal(err)
	}
	e.Close()
	e.Close()
	h.stop()
	select {
	case <-e.Done():
		t.Error("a closed watch told of an end")
	default:
	}
}

func TestOpen_RefusesWhatCannotBeAttached(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	plain := startHolder(t, mapping{uid: -1}) // in our own namespaces
	pidOf := func(pid int) func() (*Namespace, error) { return func() (*Namespace, error) { return OpenPID(pid) } }
	path := func(p string) func() (*Namespace, error) { return func() (*Namespace, error) { return OpenPath(p) } }
	tests := []struct {
		name string
		open func() (*Namespace, error)
		want error
		text string
	}{
		{"pid 0", pidOf(0), ErrInvalid, "0"},
		{"pid that does not exist", pidOf(1 << 22), ErrNoProcess, "4194304"},
		{"root's process", pidOf(1), ErrNotOwner, "process 1 belongs to uid 0"},
		{"ourselves", pidOf(os.Getpid()), ErrHostNamespace, "--network none"},
		{"a process of ours in our namespace", pidOf(plain.pid), ErrHostNamespace, strconv.Itoa(plain.pid)},
		{"our own namespace by path", path("/proc/self/ns/net"), ErrHostNamespace, "/proc/self/ns/net"},
		{"path that does not exist", path(filepath.Join(dir, "absent")), ErrNoPath, "absent"},
		{"a file", path(file), ErrNotNetns, file},
		{"a FIFO, which would block", path(fifo), ErrNotNetns, fifo},
		{"a device", path("/dev/null"), ErrNotNetns, "/dev/null"},
		{"another kind of namespace", path("/proc/self/ns/user"), ErrNotNetns, "/proc/self/ns/user"},
		{"root's namespace by path", path("/proc/1/ns/net"), ErrNotOwner, "/proc/1/ns/net"},
	}
	fds := fdCount(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n, err := tt.open()
			if err == nil {
				n.Close()
				t.Fatal("no error")
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("error %q is not %q", err, tt.want)
			}
			if !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q does not name %q in one line", err, tt.text)
			}
		})
	}
	if now := fdCount(t); now != fds {
		t.Errorf("%d descriptors before, %d after", fds, now)
	}
}

func TestParseStat_ReadsNamesWithAnyBytes(t *testing.T) {
	tail := " 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 11 12"
	for _, tt := range []struct {
		line  string
		state byte
		start uint64
		bad   bool
	}{
		{line: "12 (sleep) S" + tail, state: 'S', start: 987654},
		{line: "12 (a) Z 1 (b c) R" + tail, state: 'R', start: 987654},
		{line: "12 () )\n) Z" + tail, state: 'Z', start: 987654},
		{line: "12 (sleep) S 1 1", bad: true},
		{line: "12 sleep S", bad: true},
		{line: "", bad: true},
		{line: "12 (x) S" + strings.Replace(tail, "987654", "x", 1), bad: true},
	} {
		state, start, err := parseStat([]byte(tt.line))
		if tt.bad != (err != nil) || state != tt.state || start != tt.start {
			t.Errorf("%q: %c %d %v", tt.line, state, start, err)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (a) b) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 11"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, _ = parseStat(b)
	})
}

func TestCreateTAP_ProcessUnderASubordinateUID(t *testing.T) {
	// As a process in a container of an engine that is not its root.
	cmd := exec.Command("unshare", "--user", "--net", "--map-root-user", "--map-auto", "setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
	uid := func() string { return ownerText(cmd.Process.Pid) }
	name := func() string {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
		return strings.TrimSpace(string(b))
	}
	for name() != "sleep" {
		select {
		case <-exited:
			t.Skipf("no subordinate uids here: %s", said.String())
		case <-time.After(time.Millisecond):
		}
	}
	if uid() == "uid "+strconv.Itoa(os.Geteuid()) {
		t.Fatalf("the process has %s", uid())
	}
	tap, err := open(t, cmd.Process.Pid).CreateTAP(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	if err := tap.Delete(); err != nil {
		t.Error(err)
	}
}
