// This file tests that the readers of host sockets are woken for what there is to read, and for nothing else.

package stack

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// pending is how many events an epoll instance has.
func pending(t *testing.T, epfd int) int {
	t.Helper()
	n, err := unix.EpollWait(epfd, make([]unix.EpollEvent, 8), 0)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (w *wire) onlyDatagrams() *datagramFlow {
	w.t.Helper()
	all := w.g.live.Load().flows.all(kindUDP)
	if len(all) != 1 {
		w.t.Fatalf("%d flows", len(all))
	}
	return all[0].(*datagramFlow)
}

// A process that is being forked has copies of all descriptors for a moment.
func TestDatagramReader_ForgetsSocketsThatAForkHas(t *testing.T) {
	w := newWire(t, nil)
	server, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 7), server.LocalAddr().(*net.UDPAddr).AddrPort(), []byte("x")))
	_, client, err := server.ReadFromUDPAddrPort(make([]byte, 16))
	if err != nil {
		t.Fatal(err)
	}
	f := w.onlyDatagrams()
	f.mu.Lock()
	fork, err := unix.FcntlInt(uintptr(f.host.fd), unix.F_DUPFD_CLOEXEC, 0)
	f.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fork)
	f.end()
	if _, err := server.WriteToUDPAddrPort([]byte("late"), client); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the datagram is there", func() bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fork), Events: unix.POLLIN}}, 0)
		return n == 1 && err == nil
	})
	if err := w.g.live.Load().reader.raw.Control(func(epoll uintptr) {
		if n := pending(t, int(epoll)); n != 0 {
			t.Error("the reader is woken for a socket that is nobody's")
		}
	}); err != nil {
		t.Fatal(err)
	}
}

func TestPoller_ForgetsSocketsThatAForkHas(t *testing.T) {
	idle := func(int, func()) (func(), error) { return func() {}, nil }
	p, err := newPoller(&netstack{gw: &Gateway{cfg: Config{Attend: idle}}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	fork, err := unix.FcntlInt(uintptr(pair[0]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fork)
	if err := p.add(pair[0], nil, true); err != nil {
		t.Fatal(err)
	}
	p.close(pair[0])
	if n := pending(t, p.epfd); n != 0 {
		t.Error("the poller is woken for a socket that is nobody's")
	}
}

// Errors may wait in their queue while the socket itself has none to tell of.
func TestDatagramReader_ReadsTheQueueOfErrors(t *testing.T) {
	w := newWire(t, nil)
	server, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(loopback, 0)))
	if err != nil {
		t.Fatal(err)
	}
	w.send(makeUDP(netip.AddrPortFrom(aliceAddr, 7), server.LocalAddr().(*net.UDPAddr).AddrPort(), []byte("x")))
	eventually(t, "the flow", func() bool { return w.g.Stats().UDPOpened == 1 })
	server.Close()
	f := w.onlyDatagrams()
	f.mu.Lock()
	fd := f.host.fd
	_, err = unix.Write(fd, []byte("anybody?"))
	if err == nil {
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, int(patience.Milliseconds()))
	}
	if err == nil {
		_, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR) // which clears it
	}
	f.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the error", func() bool { return w.errorsFrom(gatewayAddr) == 1 })
	if err := w.g.live.Load().reader.raw.Control(func(epoll uintptr) {
		if n := pending(t, int(epoll)); n != 0 {
			t.Error("the reader is woken again")
		}
	}); err != nil {
		t.Fatal(err)
	}
}
