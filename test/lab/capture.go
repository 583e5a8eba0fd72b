// This file keeps the last packets of the LAN, for a test that fails.

package lab

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	captureSnap    = 128  // bytes kept of a packet
	capturePackets = 8192 // packets kept
)

// capture is a ring of the packets on the switch's ports. What comes too fast is lost, never waited for.
type capture struct {
	space *Space
	wg    sync.WaitGroup

	mu    sync.Mutex
	files []*os.File
	ring  []captured
	next  int
}

type captured struct {
	at   time.Time
	size int
	data []byte
}

// add captures on a port of the switch what the plugged-in host sends.
func (c *capture) add(port string) error {
	var f *os.File
	err := c.space.Do(func() error {
		link, err := netlink.LinkByName(port)
		if err != nil {
			return err
		}
		proto := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: link.Attrs().Index}); err != nil {
			unix.Close(fd)
			return err
		}
		f = os.NewFile(uintptr(fd), "capture")
		return nil
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.files = append(c.files, f)
	c.mu.Unlock()
	c.wg.Add(1)
	go c.read(f)
	return nil
}

func (c *capture) read(f *os.File) {
	defer c.wg.Done()
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, captureSnap)
	for {
		n, outgoing := 0, false
		var readErr error
		err := raw.Read(func(fd uintptr) bool {
			var from unix.Sockaddr
			n, from, readErr = unix.Recvfrom(int(fd), buf, unix.MSG_TRUNC)
			if ll, ok := from.(*unix.SockaddrLinklayer); ok {
				outgoing = ll.Pkttype == unix.PACKET_OUTGOING
			}
			return !errors.Is(readErr, unix.EAGAIN)
		})
		if err != nil || readErr != nil {
			if err == nil && errors.Is(readErr, unix.ENETDOWN) {
				continue
			}
			return
		}
		if outgoing { // seen on the port where it came in
			continue
		}
		c.mu.Lock()
		p := captured{at: time.Now(), size: n, data: append([]byte(nil), buf[:min(n, captureSnap)]...)}
		if len(c.ring) < capturePackets {
			c.ring = append(c.ring, p)
		} else {
			c.ring[c.next] = p
			c.next = (c.next + 1) % capturePackets
		}
		c.mu.Unlock()
	}
}

func (c *capture) stop() {
	c.mu.Lock()
	for _, f := range c.files {
		f.Close()
	}
	c.mu.Unlock()
	c.wg.Wait()
}

// save writes the ring as a pcap file.
func (c *capture) save(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	le := binary.LittleEndian
	header := le.AppendUint32(nil, 0xa1b2c3d4) // magic: microseconds
	header = le.AppendUint16(header, 2)        // version 2.4
	header = le.AppendUint16(header, 4)
	header = le.AppendUint64(header, 0) // zone, accuracy
	header = le.AppendUint32(header, captureSnap)
	header = le.AppendUint32(header, 1) // Ethernet
	_, err = w.Write(header)
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.ring {
		p := c.ring[(c.next+i)%len(c.ring)]
		rec := le.AppendUint32(nil, uint32(p.at.Unix()))
		rec = le.AppendUint32(rec, uint32(p.at.Nanosecond()/1000))
		rec = le.AppendUint32(rec, uint32(len(p.data)))
		rec = le.AppendUint32(rec, uint32(p.size))
		_, e := w.Write(append(rec, p.data...))
		err = errors.Join(err, e)
	}
	if err = errors.Join(err, w.Flush(), f.Close()); err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	return nil
}
