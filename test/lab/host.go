// This file is a host: its files, its environment and the programs that run on it.

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// commandLimit ends a program that a test waits for.
const commandLimit = 60 * time.Second

// Host is a simulated machine with one unprivileged user.
type Host struct {
	*Space
	Name  string
	Addr  netip.Addr // on the LAN
	Addr6 netip.Addr // on the LAN too, of a lab made with WithIPv6
	Dir   string     // the host's files: home/, run/ and logs

	lab      *Lab
	daemons  int
	impaired *impaired
}

// Home is the user's HOME.
func (h *Host) Home() string { return filepath.Join(h.Dir, "home") }

// XDGRuntimeDir is the user's runtime directory.
func (h *Host) XDGRuntimeDir() string { return filepath.Join(h.Dir, "run") }

func (h *Host) resolvConf() string { return filepath.Join(h.Dir, "resolv.conf") }

// SetResolvConf writes the host's resolv.conf.
func (h *Host) SetResolvConf(text string) {
	h.lab.t.Helper()
	must(h.lab.t, "resolv.conf", os.WriteFile(h.resolvConf(), []byte(text), 0o644))
}

// Env is the user's environment.
func (h *Host) Env() []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + h.Home(), "XDG_RUNTIME_DIR=" + h.XDGRuntimeDir(), "USER=user", "LANG=C.UTF-8", "TERM=dumb",
	}
}

// Result is what became of a program.
type Result struct {
	Stdout, Stderr string
	Code           int // exit code; -1 when a signal ended it
}

// Command makes a command with the host's environment, not started: see Start.
func (h *Host) Command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = h.Env()
	cmd.Dir = h.Home()
	return cmd
}

// Start starts cmd on the host as the unprivileged user with no capability. The test must wait for it.
func (h *Host) Start(cmd *exec.Cmd) error { return h.start(cmd, false) }

// Run runs a program on the host, unprivileged, and waits for it; it is killed when it takes longer than a minute.
func (h *Host) Run(name string, args ...string) Result {
	h.lab.t.Helper()
	return h.RunWith(nil, name, args...)
}

// RunWith is Run with a change to the command before it starts: input, environment, directory.
func (h *Host) RunWith(change func(*exec.Cmd), name string, args ...string) Result {
	h.lab.t.Helper()
	cmd := h.Command(name, args...)
	if change != nil {
		change(cmd)
	}
	return finish(h.lab.t, h.Space, cmd, false)
}

// CLI runs rootless-ovl with args on the host.
func (h *Host) CLI(args ...string) Result {
	h.lab.t.Helper()
	return h.Run(program(), args...)
}

// CLIJSON runs rootless-ovl with args and --output json, which must succeed, and decodes what it prints.
func (h *Host) CLIJSON(into any, args ...string) {
	t := h.lab.t
	t.Helper()
	r := h.CLI(append(args, "--output", "json")...)
	if r.Code != 0 {
		t.Fatalf("%s: rootless-ovl %v: exit code %d\n%s%s", h.Name, args, r.Code, r.Stdout, r.Stderr)
	}
	if err := json.Unmarshal([]byte(r.Stdout), into); err != nil {
		t.Fatalf("%s: rootless-ovl %v --output json: %v\n%s", h.Name, args, err, r.Stdout)
	}
}

// Binary is the path of rootless-ovl on every host.
func (h *Host) Binary() string { return program() }

// Plugin is the path of rootless-ovl-plugin, beside it.
func (h *Host) Plugin() string { return filepath.Join(filepath.Dir(program()), pluginName) }

// finish runs cmd in the space and collects its output.
func finish(t T, s *Space, cmd *exec.Cmd, privileged bool) Result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &stdout
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &stderr
	}
	cmd.WaitDelay = 2 * time.Second
	must(t, cmd.Path, s.start(cmd, privileged))
	limit := time.AfterFunc(commandLimit, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	if !limit.Stop() {
		t.Errorf("%v: still running after %v, killed", cmd.Args, commandLimit)
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}

// stop ends a process that the lab started: signal, and SIGKILL when it takes too long. done is closed when it was waited for.
func stop(p *os.Process, sig os.Signal, done <-chan struct{}, limit time.Duration) (clean bool) {
	_ = p.Signal(unix.SIGCONT)
	_ = p.Signal(sig)
	select {
	case <-done:
		return true
	case <-time.After(limit):
		_ = p.Kill()
		<-done
		return false
	}
}

// Eventually calls ok until it says true; the test fails with what after a generous limit. It is how tests wait: they
// never measure time.
func Eventually(t T, what string, ok func() bool) {
	t.Helper()
	EventuallyWithin(t, 30*time.Second, what, ok)
}

// EventuallyWithin is Eventually with another limit.
func EventuallyWithin(t T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for pause := 5 * time.Millisecond; !ok(); pause = min(2*pause, 200*time.Millisecond) {
		select {
		case <-ctx.Done():
			t.Fatalf("waited %v in vain: %s", limit, what)
		case <-time.After(pause):
		}
	}
}

// HideTun takes /dev/net/tun away from the host.
func (h *Host) HideTun() error {
	return h.Do(func() error { return unix.Mount("none", "/dev/net", "tmpfs", 0, "") })
}

// CloseTun leaves a /dev/net/tun that the user may not open: a file of root's, who is nobody inside the lab.
func (h *Host) CloseTun() error {
	for _, closed := range []string{"/dev/console", "/etc/shadow"} {
		if unix.Access(closed, unix.R_OK|unix.W_OK) != nil {
			return h.Do(func() error { return unix.Mount(closed, "/dev/net/tun", "", unix.MS_BIND, "") })
		}
	}
	return errors.New("this user may open /dev/console and /etc/shadow")
}

// LoseAddress takes the host's address on the LAN away, and with it the default route.
func (h *Host) LoseAddress() error { return h.LoseAddr(netip.PrefixFrom(h.Addr, LAN.Bits())) }

// LoseAddress6 takes its IPv6 address away. The default route stays, as it does.
func (h *Host) LoseAddress6() error { return h.LoseAddr(netip.PrefixFrom(h.Addr6, LAN6.Bits())) }

// LoseAddr takes one of its addresses on the LAN away.
func (h *Host) LoseAddr(addr netip.Prefix) error {
	return h.Do(func() error {
		link, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr.String())
		if err != nil {
			return err
		}
		return netlink.AddrDel(link, a)
	})
}

// GetAddress gives a host that has lost its address this one, of either family, with a default route, as DHCP or a router does.
func (h *Host) GetAddress(addr netip.Addr) error {
	own, lan, router := &h.Addr, LAN, RouterAddr
	if addr.Is6() {
		own, lan, router = &h.Addr6, LAN6, RouterAddr6
	}
	*own = addr
	return h.Do(func() error {
		link, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		if err := addAddr(link, netip.PrefixFrom(addr, lan.Bits())); err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{
			Gw: router.AsSlice(), LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: net.IP(make([]byte, addr.BitLen()/8)), Mask: net.CIDRMask(0, addr.BitLen())},
		})
	})
}
