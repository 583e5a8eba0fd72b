// forward: where it listens, where that leads, what it refuses.

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// forwarder runs forward with these arguments and returns the lines that it prints; stop ends it.
func (b *bench) forwarder(args ...string) (lines *bufio.Scanner, stop func() (code int, stderr string)) {
	out, in, err := os.Pipe() // which takes what nobody reads yet
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { out.Close() })
	var said bytes.Buffer
	w := b.world
	w.stdout, w.stderr = in, &said
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int, 1)
	go func() {
		code := execute(ctx, w, append([]string{"forward"}, args...))
		in.Close()
		done <- code
	}()
	return bufio.NewScanner(out), func() (int, string) {
		cancel()
		code := <-done
		return code, said.String()
	}
}

func TestForward_CarriesConnectionsToTheDaemon(t *testing.T) {
	b := newBench(t).serve()
	lines, stop := b.forwarder("0", "web:80", "127.0.0.2:0", "10.213.7.20:5432")
	var at [][]string
	for range 2 {
		if !lines.Scan() {
			t.Fatal("it says nothing")
		}
		f := strings.Fields(lines.Text())
		at = append(at, f[1:len(f)-2])
		if f[0] != "forwarding" || f[len(f)-2] != "to" {
			t.Errorf("%q", lines.Text())
		}
	}
	if a := netip.MustParseAddrPort(at[0][0]); a.Addr().String() != "127.0.0.1" {
		t.Errorf("listens on %v", at[0])
	}
	for _, to := range []string{at[0][0], at[1][0]} {
		conn, err := net.Dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "hello")
		_ = conn.(*net.TCPConn).CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
			t.Errorf("%s: %q, %v", to, got, err)
		}
		conn.Close()
	}
	if got := b.daemon.notes.String(); got != "forward web:80, forward 10.213.7.20:5432" {
		t.Errorf("asked for %s", got)
	}
	open, err := net.Dial("tcp", at[0][0])
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	_, _ = io.WriteString(open, "x")
	if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if code, stderr := stop(); code != 0 || stderr != "" {
		t.Errorf("exit status %d, %q", code, stderr)
	}
	if _, err := open.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an open connection reads %v at the end, want a reset", err)
	}
}

func TestForward_ResetsWhatTheDaemonRefuses(t *testing.T) {
	b := newBench(t).serve()
	b.daemon.forwardAt = make(chan struct{})
	b.daemon.forwardErr = api.Errorf(api.CodeNotFound, "no container is called web")
	lines, stop := b.forwarder("127.0.0.1:0", "web:80")
	lines.Scan()
	conn, err := net.Dial("tcp", strings.Fields(lines.Text())[1])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	close(b.daemon.forwardAt)
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %v, want a reset", err)
	}
	code, stderr := stop()
	if want := "rootless-ovl: connection of " + conn.LocalAddr().String() + ": no container is called web\n"; code != 0 || stderr != want {
		t.Errorf("exit status %d, %q; want %q", code, stderr, want)
	}
}

func TestForward_WarnsBeyondLoopback(t *testing.T) {
	b := newBench(t).serve()
	lines, stop := b.forwarder("-o", "json", "0.0.0.0:0", "web:80")
	var text string
	for !strings.HasSuffix(text, "]") && lines.Scan() {
		text += strings.TrimSpace(lines.Text())
	}
	if got := jsonNames(t, text); strings.Join(got, " ") != "listen to" {
		t.Errorf("%s", text)
	}
	if code, stderr := stop(); code != 0 || !strings.Contains(stderr, "is not loopback: whoever reaches it reaches web:80") {
		t.Errorf("exit status %d, %q", code, stderr)
	}
}

func TestForward_RefusesWhatItCannotDo(t *testing.T) {
	b := newBench(t).serve()
	for _, tt := range []struct{ args, says string }{
		{"", "pairs"}, {"8080", "pairs"}, {"8080 web:80 9090", "pairs"},
		{"http web:80", `"http" is not a port`}, {"65536 web:80", `"65536"`}, {":8080 web:80", `":8080"`}, {"::1:8080x web:80", "8080x"},
		{"example.com:8080 web:80", "example.com"}, {"8080 web", `"web"`}, {"8080 web:0", `"0"`}, {"8080 we/b:80", "we/b"},
	} {
		code := b.run(append([]string{"forward"}, strings.Fields(tt.args)...)...)
		b.checkError(code, exitUsage, tt.says)
	}
	for to, says := range map[string]string{
		"127.0.0.1:80": "127.0.0.1 is not in the overlay (10.213.0.0/16)", "192.0.2.1:80": "not in the overlay", "[::1]:80": "not in the overlay",
		"10.213.7.1:80": "the gateway's own address", "[::ffff:10.213.7.1]:80": "the gateway's own address",
	} {
		code := b.run("forward", "0", "web:80", "0", to)
		b.checkError(code, exitFailed, says)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	code := b.run("forward", port, "web:80")
	b.checkError(code, exitFailed, taken.Addr().String()+" is taken")
	code = b.run("forward", "192.0.2.99:8080", "web:80")
	b.checkError(code, exitFailed, "192.0.2.99 is not an address of this host (see `ip address`)")
}

func TestForward_ListensOnIPv4AloneAtAnAddressOfIt(t *testing.T) {
	b := newBench(t).serve()
	lines, stop := b.forwarder("0.0.0.0:0", "web:80")
	lines.Scan()
	_, port, err := net.SplitHostPort(strings.Fields(lines.Text())[1])
	if err != nil {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", "[::1]:"+port); err == nil {
		conn.Close()
		t.Error("it is reached over IPv6")
	}
	if code, _ := stop(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

func TestLocalAddr_IsAPortOrAnAddressAndAPort(t *testing.T) {
	for s, want := range map[string]string{
		"8080": "invalid AddrPort", "0": "invalid AddrPort", "localhost:8080": "invalid AddrPort",
		"127.0.0.1:8080": "127.0.0.1:8080", "[::1]:8080": "[::1]:8080", "[::ffff:127.0.0.1]:1": "127.0.0.1:1",
	} {
		if got, err := localAddr(s); err != nil || got.String() != want {
			t.Errorf("%s: %v, %v; want %s", s, got, err, want)
		}
	}
}
