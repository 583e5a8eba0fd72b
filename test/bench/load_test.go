// Tests of the load generators, over loopback.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// freePort is a loopback address whose port, and those after it, nobody uses.
func freePort(t *testing.T, ports int) netip.AddrPort {
	t.Helper()
	for range 50 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		addr := l.Addr().(*net.TCPAddr).AddrPort()
		free := true
		for i := 1; i < ports; i++ {
			next, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", int(addr.Port())+i))
			if err != nil {
				free = false
				break
			}
			next.Close()
		}
		if free {
			return addr
		}
	}
	t.Fatal("no free ports")
	return netip.AddrPort{}
}

// startServer runs a serving load until the test ends, once it says that it is ready.
func startServer(t *testing.T, load func(context.Context, loadOptions, io.Reader, io.Writer) error, o loadOptions) {
	t.Helper()
	in, stop := io.Pipe()
	out, says := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := load(t.Context(), o, in, says)
		says.CloseWithError(io.EOF)
		done <- err
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != ready+"\n" {
		t.Fatalf("the server said %q %v: %v", line, err, <-done)
	}
	t.Cleanup(func() {
		stop.Close()
		if err := <-done; err != nil {
			t.Errorf("server: %v", err)
		}
	})
}

// askClient runs a load that answers once.
func askClient(t *testing.T, into any, load func(context.Context, loadOptions, io.Reader, io.Writer) error, o loadOptions) {
	t.Helper()
	out, says := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := load(t.Context(), o, nil, says)
		says.CloseWithError(io.ErrUnexpectedEOF)
		done <- err
	}()
	if err := json.NewDecoder(out).Decode(into); err != nil {
		t.Fatalf("no answer: %v, %v", err, <-done)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestRTT_MeasuresRoundTrips(t *testing.T) {
	o := loadOptions{addr: freePort(t, 1), cpu: -1, seconds: 0.3}
	startServer(t, rttServe, o)
	var got roundTrips
	askClient(t, &got, rttClient, o)
	if got.P50 <= 0 || got.P99 < got.P50 {
		t.Errorf("got %+v, want 0 < p50 <= p99", got)
	}
}

func TestConns_CountsConnections(t *testing.T) {
	o := loadOptions{addr: freePort(t, connsPorts), cpu: -1, seconds: 0.2, workers: 4}
	startServer(t, connsServe, o)
	var got connections
	askClient(t, &got, connsClient, o)
	if got.Done == 0 || got.Failed != 0 || got.Seconds < 0.2 {
		t.Errorf("got %+v, want some connections and no failure", got)
	}
}

func TestConns_CountsFailures(t *testing.T) {
	var got connections
	askClient(t, &got, connsClient, loadOptions{addr: freePort(t, connsPorts), seconds: 0.05, workers: 2})
	if got.Done != 0 || got.Failed == 0 || got.Error == "" {
		t.Errorf("got %+v, want failures: nobody listens", got)
	}
}

func TestUDP_CountsEveryDatagramOfATrial(t *testing.T) {
	for _, c := range []struct {
		name string
		size int
		gso  bool
	}{{"single", 64, false}, {"single large", 1400, false}, {"GSO", 64, true}, {"GSO large", 1400, true}} {
		t.Run(c.name, func(t *testing.T) {
			fd, addr, err := udpSocket(netip.MustParseAddrPort("127.0.0.1:0"))
			if err != nil {
				t.Fatal(err)
			}
			// The receiver keeps waiting in its goroutine: the socket stays open for the life of the test program.
			if err := unix.Bind(fd, addr); err != nil {
				t.Fatal(err)
			}
			if c.gso {
				if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1); err != nil {
					t.Skipf("this kernel has no UDP_GRO: %v", err)
				}
			}
			name, err := unix.Getsockname(fd)
			if err != nil {
				t.Fatal(err)
			}
			counts := new([maxTrials]atomic.Uint64)
			go func() { _ = countDatagrams(fd, counts) }()
			s, err := newUDPSender(loadOptions{
				addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(name.(*unix.SockaddrInet4).Port)), size: c.size, gso: c.gso,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(s.fd)
			for number := uint32(1); number <= 2; number++ {
				result, err := s.send(t.Context(), number, 2000, 100*time.Millisecond)
				if err != nil {
					t.Fatal(err)
				}
				if result.Packets == 0 || result.Packets > 300 {
					t.Errorf("trial %d: sent %d packets, 200 were asked for", number, result.Packets)
				}
				deadline := time.Now().Add(10 * time.Second)
				for counts[number].Load() < uint64(result.Packets) && time.Now().Before(deadline) {
					time.Sleep(time.Millisecond)
				}
				if got := counts[number].Load(); got != uint64(result.Packets) {
					t.Errorf("trial %d: sent %d packets, counted %d", number, result.Packets, got)
				}
			}
		})
	}
}

func TestRunLoad_RefusesUnknownNames(t *testing.T) {
	if err := runLoad(t.Context(), []string{"stampede"}, nil, nil); err == nil {
		t.Error("an unknown load ran")
	}
}
