// This file is about TAPs that are made for somebody else to take (TAPConfig.Loose): he moves the device to another namespace, names and
// configures it there, and its descriptor goes on working. The descriptor tells where the device is now (TUNGETDEVNETNS, TUNGETIFF); to
// a process that has lost its descriptors, the processes of the machine tell which namespaces there are.
//
// Source: __tun_chr_ioctl in drivers/net/tun.c.

package nsutil

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Place is where a TAP is.
type Place struct {
	Inode  uint64 // of the network namespace
	IfName string // there
}

// PlaceOf tells where the device of a TAP's descriptor is. ErrNoTAP: it is gone. ErrNotOwner: it is in a namespace that is not ours, where
// nothing can be known of it.
func PlaceOf(fd int) (Place, error) {
	f, err := netnsOf(fd)
	if err != nil {
		return Place{}, err
	}
	defer f.Close()
	var p Place
	if p.Inode, err = fileInode(f); err != nil {
		return Place{}, err
	}
	ifr, err := unix.NewIfreq("")
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr)
	}
	if err != nil {
		return Place{}, placeError(err)
	}
	p.IfName = ifr.Name()
	return p, nil
}

// NamespaceOf opens the namespace in which the device of a TAP's descriptor is. Errors are as of PlaceOf, and ErrHostNamespace.
func NamespaceOf(fd int) (*Namespace, error) {
	f, err := netnsOf(fd)
	if err != nil {
		return nil, err
	}
	return newNamespace(f, f.Name())
}

func netnsOf(fd int) (*os.File, error) {
	ns, err := unix.IoctlRetInt(fd, unix.TUNGETDEVNETNS)
	if err != nil {
		return nil, placeError(err)
	}
	return os.NewFile(uintptr(ns), "the namespace of a TAP"), nil
}

func placeError(err error) error {
	switch {
	case errors.Is(err, unix.EBADFD):
		return fail(ErrNoTAP, err, "the TAP is gone from its namespace")
	case errors.Is(err, unix.EPERM):
		return fail(ErrNotOwner, err, "the TAP was moved to a namespace that is not yours")
	}
	return fmt.Errorf("where a TAP is: %w", err)
}

// TAPs lists the TUN and TAP devices of the namespace.
func (n *Namespace) TAPs() ([]Device, error) {
	in, err := n.enter(0)
	if err != nil {
		return nil, err
	}
	defer func() { unix.Close(in.netlink) }()
	links, err := newRTNL(in.netlink).links("tun")
	if err != nil {
		return nil, fmt.Errorf("%s: listing interfaces: %w", n.name, err)
	}
	var devices []Device
	for _, l := range links {
		devices = append(devices, Device{IfName: l.name, Alias: l.alias, MAC: l.mac, Up: l.up})
	}
	return devices, nil
}
