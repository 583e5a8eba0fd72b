// This file hurts a host's cable: frames that are lost, doubled, late, out of order or too long for the way, and a cable or an
// interface that is down. Not every kernel has netem, so the frames pass through a relay of our own.

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Impairment is what happens to frames of one direction. The zero value is a good cable.
type Impairment struct {
	Loss      float64       // share of the frames that vanish, 0 to 1; 1 is a way that is closed
	Duplicate float64       // share that comes twice
	Reorder   float64       // share that is held back for some milliseconds while others pass
	Delay     time.Duration // of every frame
	Jitter    time.Duration // most that is added to Delay, another time for each frame; it changes no order
	MaxPacket int           // bytes; longer IP packets vanish without a word, as in a black hole of the MTU. 0: all pass
}

// held is for how long a reordered frame is held back, at most.
const held = 10 * time.Millisecond

// queued bounds the frames that wait because of Delay; what comes above that is lost, as in a router.
const queued = 4096

// impaired is a cable with the relay in it. On the switch's side of a host's port there is, instead of the switch, another bridge:
//
//	to-h1 - bridge imp-h1 - ia-h1 = ib-h1 - relay - ic-h1 = id-h1 - switch
//
// ia and id have superpackets cut before the relay sees them, so that one lost frame is one lost packet.
type impaired struct {
	links []netlink.Link // that were made
	files []*os.File
	wg    sync.WaitGroup
	quit  chan struct{}
}

// Impair hurts the host's cable in both directions from now on, instead of what was there before; see Mend.
func (h *Host) Impair(i Impairment) error { return h.ImpairWays(i, i) }

// ImpairWays is Impair with another impairment for each direction: of what the host sends, and of what it is sent.
func (h *Host) ImpairWays(out, in Impairment) error {
	if err := h.Mend(); err != nil {
		return err
	}
	imp := &impaired{quit: make(chan struct{})}
	h.impaired = imp
	err := h.lab.fabric.Do(func() error { return imp.lay(h.Name, h.lab.mtu) })
	if err == nil {
		imp.wg.Add(2)
		go imp.carry(imp.files[0], imp.files[1], out)
		go imp.carry(imp.files[1], imp.files[0], in)
		err = h.plugInto("imp-" + h.Name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("impair %s: %w", h.Name, err), h.Mend())
	}
	return nil
}

// Mend undoes Impair: the cable is good again. What the relay held is lost.
func (h *Host) Mend() error {
	imp := h.impaired
	if imp == nil {
		return nil
	}
	h.impaired = nil
	err := h.plugInto("switch")
	close(imp.quit)
	for _, f := range imp.files {
		f.Close()
	}
	imp.wg.Wait()
	return errors.Join(err, h.lab.fabric.Do(func() error {
		var err error
		for _, link := range imp.links {
			err = errors.Join(err, netlink.LinkDel(link))
		}
		return err
	}))
}

// plugInto has the host's port belong to a bridge.
func (h *Host) plugInto(bridge string) error {
	return h.lab.fabric.Do(func() error {
		port, err := netlink.LinkByName("to-" + h.Name)
		if err != nil {
			return err
		}
		master, err := netlink.LinkByName(bridge)
		if err != nil {
			return err
		}
		return netlink.LinkSetMaster(port, master)
	})
}

// lay makes bridge, cables and sockets, in the calling thread's namespace.
func (imp *impaired) lay(host string, mtu int) error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "imp-" + host, MTU: mtu}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return err
	}
	imp.links = append(imp.links, bridge)
	if err := netlink.LinkSetUp(bridge); err != nil {
		return err
	}
	near, err := imp.pair("ia-"+host, "ib-"+host, bridge.Name, mtu)
	if err != nil {
		return err
	}
	far, err := imp.pair("id-"+host, "ic-"+host, "switch", mtu)
	if err != nil {
		return err
	}
	imp.files = []*os.File{near, far}
	return carry("ia-"+host, "ib-"+host, "ic-"+host, "id-"+host)
}

// pair makes a cable from a bridge to a socket of the relay.
func (imp *impaired) pair(at, to, bridge string, mtu int) (*os.File, error) {
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: at, MTU: mtu}, PeerName: to}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, err
	}
	imp.links = append(imp.links, veth)
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return nil, err
	}
	peer, err := netlink.LinkByName(to)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		netlink.LinkSetGSOMaxSegs(veth, 1),
		netlink.LinkSetMaster(veth, master), netlink.LinkSetUp(veth), netlink.LinkSetUp(peer),
	); err != nil {
		return nil, err
	}
	proto := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	// The header before each frame tells of checksums that are still owed, which a virtual cable does not complete.
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: peer.Attrs().Index}),
	); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), to), nil
}

// late is a frame that waits for its time.
type late struct {
	due   time.Time
	frame []byte
}

// carry is the relay of one direction.
func (imp *impaired) carry(from, to *os.File, i Impairment) {
	defer imp.wg.Done()
	queue := make(chan late, queued)
	defer close(queue)
	imp.wg.Add(1)
	go func() {
		defer imp.wg.Done()
		for l := range queue {
			select {
			case <-imp.quit:
				return
			case <-time.After(time.Until(l.due)):
				_, _ = to.Write(l.frame) // a frame that cannot leave is lost
			}
		}
	}()
	buf := make([]byte, 80<<10)
	for {
		n, err := from.Read(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue
		}
		if err != nil {
			return
		}
		if i.MaxPacket > 0 && n-vnetHeader-14 > i.MaxPacket || rand.Float64() < i.Loss {
			continue
		}
		times := 1
		if rand.Float64() < i.Duplicate {
			times = 2
		}
		for range times {
			switch {
			case rand.Float64() < i.Reorder:
				frame := append([]byte(nil), buf[:n]...)
				time.AfterFunc(i.Delay+rand.N(held), func() { _, _ = to.Write(frame) })
			case i.Delay+i.Jitter > 0:
				wait := i.Delay
				if i.Jitter > 0 {
					wait += rand.N(i.Jitter)
				}
				select {
				case queue <- late{time.Now().Add(wait), append([]byte(nil), buf[:n]...)}:
				default:
				}
			default:
				_, _ = to.Write(buf[:n])
			}
		}
	}
}

// Unplug pulls the host's cable: its interface stays up without a carrier, with its addresses and routes. Plug puts it back.
func (h *Host) Unplug() error { return h.port(netlink.LinkSetDown) }

// Plug undoes Unplug.
func (h *Host) Plug() error { return h.port(netlink.LinkSetUp) }

func (h *Host) port(set func(netlink.Link) error) error {
	return h.lab.fabric.Do(func() error {
		port, err := netlink.LinkByName("to-" + h.Name)
		if err != nil {
			return err
		}
		return set(port)
	})
}

// LinkDown sets the host's interface down, with which the kernel forgets its routes and IPv6 addresses. LinkUp brings them back.
func (h *Host) LinkDown() error {
	return h.Do(func() error {
		link, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(link)
	})
}

// LinkUp undoes LinkDown, as a host's network configuration does: interface, addresses, default routes.
func (h *Host) LinkUp() error {
	return h.Do(func() error {
		link, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		route := func(gateway net.IP, bits int) error {
			return netlink.RouteReplace(&netlink.Route{
				Gw: gateway, LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)},
			})
		}
		if err := route(RouterAddr.AsSlice(), 32); err != nil {
			return err
		}
		if !h.lab.ipv6 {
			return nil
		}
		addr, err := netlink.ParseAddr(h.Addr6.String() + "/64")
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		return errors.Join(netlink.AddrReplace(link, addr), route(RouterAddr6.AsSlice(), 128))
	})
}
