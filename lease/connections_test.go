// This file tests what becomes of connections when the host's addresses change.

package lease

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"google.golang.org/grpc/credentials/insecure"
)

func TestConnections_DropThoseOfLostAddresses(t *testing.T) {
	ln, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				b := make([]byte, 1)
				for {
					if _, err := c.Read(b); err != nil {
						_ = c.Close()
						return
					}
					_, _ = c.Write(b)
				}
			}()
		}
	}()
	in := &connections{open: make(map[net.Conn]bool)}
	connect := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from + ":0"))}
		raw, err := d.DialContext(t.Context(), "tcp4", net.JoinHostPort("127.0.0.1", portOf(ln)))
		if err != nil {
			t.Fatal(err)
		}
		conn, _, err := listed{insecure.NewCredentials(), in}.Clone().ClientHandshake(t.Context(), "store", raw)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	echoes := func(c net.Conn) error {
		b := []byte{7}
		_, err := c.Write(b)
		if err == nil {
			_, err = c.Read(b)
		}
		return err
	}
	closed, stays, goes := connect("127.0.0.3"), connect("127.0.0.1"), connect("127.0.0.2")
	if err := closed.Close(); err != nil {
		t.Error(err)
	}
	in.drop(func(local netip.Addr) bool {
		if local == netip.MustParseAddr("127.0.0.3") {
			t.Error("a connection that is closed is still in the list")
		}
		return local == netip.MustParseAddr("127.0.0.2")
	})
	if err := echoes(stays); err != nil {
		t.Errorf("from an address that is still there: %v", err)
	}
	if err := echoes(goes); !errors.Is(err, net.ErrClosed) {
		t.Errorf("from one that is lost: %v", err)
	}
	for _, c := range []net.Conn{stays, goes} {
		_ = c.Close()
	}
	if len(in.open) != 0 {
		t.Errorf("left in the list: %v", in.open)
	}
}

func portOf(ln net.Listener) string {
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}
