// This file is the container's network namespace: how it is opened, and what CHECK sees in it.

package cni

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

// namespace is an open network namespace. It belongs to whoever opened it, until Close.
type namespace struct {
	file   *os.File
	dev    uint64
	inode  uint64
	inside func(ifName string) (view, error) // look
}

// openNamespace opens CNI_NETNS, which may be anything.
func openNamespace(path string) (*namespace, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fail(types.ErrInvalidNetNS, "%s=%.200s: %v: run the plugin as the container's user, and in no user namespace but the container's or one around it", envNetns, path, err)
	case err != nil:
		return nil, fail(types.ErrInvalidNetNS, "%s=%.200s: %v: is the container still there?", envNetns, path, err)
	}
	file := os.NewFile(uintptr(fd), path)
	var stat unix.Stat_t
	kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err == nil && kind == unix.CLONE_NEWNET {
		err = unix.Fstat(fd, &stat)
	} else {
		err = errors.New("it is no network namespace")
	}
	if err != nil {
		file.Close()
		return nil, fail(types.ErrInvalidNetNS, "%s=%.200s: %v", envNetns, path, err)
	}
	ns := &namespace{file: file, dev: stat.Dev, inode: stat.Ino}
	ns.inside = ns.look
	return ns, nil
}

func (ns *namespace) fd() int { return int(ns.file.Fd()) }

func (ns *namespace) Close() { ns.file.Close() }

// isOurs tells whether the plugin itself runs in it.
func (ns *namespace) isOurs() bool {
	var stat unix.Stat_t
	return unix.Stat("/proc/self/ns/net", &stat) == nil && stat.Dev == ns.dev && stat.Ino == ns.inode
}

// view is an interface as it is inside the container.
type view struct {
	missing      bool // there is none of that name
	up           bool
	mac          string
	addrs        []netip.Prefix
	defaultRoute bool // an IPv4 default route leads out of it
}

// errNotAllowed is that this process may not enter a namespace.
var errNotAllowed = errors.New("not allowed to enter the container's network namespace")

// look says what an interface is like inside.
func (ns *namespace) look(ifName string) (view, error) {
	var v view
	done := make(chan error)
	go func() {
		// The thread is never unlocked: it ends with the goroutine, and nobody else runs in the container's namespace.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Setns(ns.fd(), unix.CLONE_NEWNET); err != nil {
				if errors.Is(err, unix.EPERM) {
					return errNotAllowed
				}
				return fmt.Errorf("enter the container's network namespace: %w", err)
			}
			return v.fill(ifName)
		}()
	}()
	err := <-done
	return v, err
}

// fill asks the kernel in the namespace of the calling thread.
func (v *view) fill(ifName string) error {
	list, err := net.Interfaces()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(ifi net.Interface) bool { return ifi.Name == ifName })
	if v.missing = i < 0; v.missing {
		return nil
	}
	ifi := list[i]
	v.up = ifi.Flags&net.FlagUp != 0
	v.mac = ifi.HardwareAddr.String()
	addrs, err := ifi.Addrs()
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			v.addrs = append(v.addrs, p)
		}
	}
	routes, err := os.Open("/proc/thread-self/net/route")
	if err != nil {
		return err
	}
	defer routes.Close()
	lines := bufio.NewScanner(routes)
	for lines.Scan() {
		// Iface Destination Gateway Flags RefCnt Use Metric Mask ..., numbers in hex
		f := strings.Fields(lines.Text())
		if len(f) >= 8 && f[0] == ifName && f[1] == "00000000" && f[7] == "00000000" {
			v.defaultRoute = true
		}
	}
	return lines.Err()
}
