// This file moves threads into namespaces and takes capabilities away from them.

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Space is a network namespace, and for a host a mount namespace with it. Its methods may be called from any goroutine.
type Space struct {
	net *os.File
	mnt *os.File // nil: the lab's own
}

// onThread runs fn on a thread of its own, which ends with it.
func onThread(fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		err := errors.New("lab: the function left without returning (t.FailNow inside Do?)")
		defer func() { result <- err }()
		err = fn()
	}()
	return <-result
}

// newSpace makes an empty network namespace, and a copy of the mount namespace with it.
func newSpace() (*Space, error) {
	s := &Space{}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		var err error
		if s.net, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		s.mnt, err = os.Open("/proc/thread-self/ns/mnt")
		return err
	})
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *Space) close() {
	if s.net != nil {
		s.net.Close()
	}
	if s.mnt != nil {
		s.mnt.Close()
	}
}

// enter moves the calling thread, for good.
func (s *Space) enter() error {
	if s.mnt != nil {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare fs: %w", err)
		}
		if err := unix.Setns(int(s.mnt.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter mount namespace: %w", err)
		}
	}
	if err := unix.Setns(int(s.net.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return nil
}

// Do runs fn on a thread inside the space, with every capability over it. fn must not start goroutines that count on the
// namespace, and must not call FailNow; sockets that it opens stay in the space.
func (s *Space) Do(fn func() error) error {
	return onThread(func() error {
		if err := s.enter(); err != nil {
			return err
		}
		return fn()
	})
}

// Listen opens a stream listener in the space.
func (s *Space) Listen(network, address string) (net.Listener, error) {
	var l net.Listener
	err := s.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// ListenPacket opens a packet socket in the space.
func (s *Space) ListenPacket(network, address string) (net.PacketConn, error) {
	var c net.PacketConn
	err := s.Do(func() (err error) {
		c, err = net.ListenPacket(network, address)
		return err
	})
	return c, err
}

// DialContext opens a connection from the space; address must hold an IP address and not a name.
func (s *Space) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("lab: dial needs an address: %w", err)
	}
	var c net.Conn
	err := s.Do(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// start starts cmd in the space. Without privileged, cmd has no capability and cannot get one: what an unprivileged user has.
func (s *Space) start(cmd *exec.Cmd, privileged bool) error {
	return s.Do(func() error {
		uid, gid, rooted := hostUser()
		switch {
		case privileged:
		case rooted:
			// It becomes a user's by the exec. The bounding set stays: without it newuidmap is not privileged either.
			if cmd.SysProcAttr == nil {
				cmd.SysProcAttr = &syscall.SysProcAttr{}
			}
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		default:
			if err := dropCaps(); err != nil {
				return err
			}
		}
		return cmd.Start()
	})
}

// lastCap is the highest capability that the kernel knows.
func lastCap() uintptr {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return unix.CAP_LAST_CAP
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return unix.CAP_LAST_CAP
	}
	return uintptr(n)
}

func allCaps() []uintptr {
	var caps []uintptr
	for c := uintptr(0); c <= lastCap(); c++ {
		caps = append(caps, c)
	}
	return caps
}

// dropCaps takes every capability from the calling thread, and the chance to get one back by an exec.
func dropCaps() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	for c := uintptr(0); c <= lastCap(); c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

// Capabilities reads the capability sets of a process: CapInh, CapPrm, CapEff, CapBnd, CapAmb.
func Capabilities(pid int) (map[string]uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	sets := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, value, ok := strings.Cut(line, ":")
		if !ok || !strings.HasPrefix(name, "Cap") {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("%s of process %d: %w", name, pid, err)
		}
		sets[name] = n
	}
	if _, ok := sets["CapEff"]; !ok {
		return nil, fmt.Errorf("process %d: no CapEff in its status", pid)
	}
	return sets, nil
}
