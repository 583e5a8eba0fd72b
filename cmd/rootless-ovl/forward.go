// rootless-ovl forward: ports of this host that lead to containers.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/internal/relay"
)

// forwarding is one pair of the command line: where we listen, and where that leads.
type forwarding struct {
	local netip.AddrPort // without an address: the loopback's, of both families
	to    string

	listeners []*net.TCPListener
}

// forwardingText is a forwarding as it is printed.
type forwardingText struct {
	Listen []string `json:"listen"`
	To     string   `json:"to"`
}

func (a *app) forwardCommand() *cobra.Command {
	var pairs []*forwarding
	return &cobra.Command{
		Use:   "forward {[LOCALADDR:]PORT {NAME|ADDR}:PORT}...",
		Short: "Listen on ports of this host that lead to containers",
		Long: `Listen on this host and pass every TCP connection on to a container anywhere in the overlay, as ssh -L and kubectl port-forward do, until
SIGINT or SIGTERM. The container sees the gateway's address.

The port is that of 127.0.0.1 and ::1 unless an address is given; port 0 is any free one, and is printed.`,
		Example: `  rootless-ovl forward 8080 web:80
  rootless-ovl forward 5432 10.213.7.20:5432 127.0.0.2:8080 web:80`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 || len(args)%2 != 0 {
				return usagef("forward takes pairs of a local port and where it leads: `rootless-ovl forward 8080 web:80`")
			}
			for i := 0; i < len(args); i += 2 {
				local, err := localAddr(args[i])
				if err != nil {
					return usageError{err}
				}
				if _, _, err := api.SplitTarget(args[i+1]); err != nil {
					return usageError{err}
				}
				pairs = append(pairs, &forwarding{local: local, to: args[i+1]})
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, stop := untilSignal(cmd.Context())
			defer stop()
			status, err := c.Status(ctx) // better now than at the first connection
			if err != nil {
				return err
			}
			for _, f := range pairs {
				if err := checkTarget(f.to, status); err != nil {
					return err
				}
			}
			return a.forward(ctx, c, pairs)
		},
	}
}

// checkTarget refuses an address that the node will never dial. A name may come to be one's later.
func checkTarget(to string, s api.Status) error {
	host, _, err := api.SplitTarget(to)
	if err != nil {
		return err
	}
	a, err := netip.ParseAddr(host)
	if err != nil || s.Network == "" {
		return nil
	}
	a = a.Unmap()
	for _, own := range []string{s.Gateway, s.Gateway6} {
		if own == a.String() {
			return api.Errorf(api.CodeDenied, "%v is the gateway's own address: only containers are dialled", a)
		}
	}
	var networks []string
	for _, text := range []string{s.Network, s.Network6} {
		network, err := netip.ParsePrefix(text)
		if err == nil && network.Contains(a) {
			return nil
		}
		if err == nil {
			networks = append(networks, text)
		}
	}
	return api.Errorf(api.CodeDenied, "%v is not in the overlay (%s): only addresses in it are dialled", a, strings.Join(networks, ", "))
}

// localAddr reads "[ADDR:]PORT"; without an address, or with the name localhost, it has none.
func localAddr(s string) (netip.AddrPort, error) {
	host, number := "", s
	if strings.Contains(s, ":") {
		var err error
		if host, number, err = net.SplitHostPort(s); err != nil || host == "" {
			return netip.AddrPort{}, fmt.Errorf("%q is neither a port nor an address and a port: write it as 8080, 127.0.0.1:8080 or [::1]:8080", s)
		}
	}
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not a port: use 1 to 65535, or 0 for any free one", number)
	}
	var addr netip.Addr
	if host != "" && host != "localhost" {
		if addr, err = netip.ParseAddr(host); err != nil {
			return netip.AddrPort{}, fmt.Errorf("%q is not an address of this host: write it as 127.0.0.1:8080", host)
		}
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), nil
}

// forward opens all ports and serves them until ctx ends.
func (a *app) forward(ctx context.Context, c *api.Client, pairs []*forwarding) error {
	defer func() {
		for _, f := range pairs {
			f.close()
		}
	}()
	texts := make([]forwardingText, 0, len(pairs))
	for _, f := range pairs {
		if err := f.listen(); err != nil {
			return err
		}
		t := forwardingText{To: f.to}
		for _, ln := range f.listeners {
			t.Listen = append(t.Listen, ln.Addr().String())
		}
		texts = append(texts, t)
		if addr := f.local.Addr(); addr.IsValid() && !addr.IsLoopback() {
			fmt.Fprintf(a.stderr, "rootless-ovl: warning: %v is not loopback: whoever reaches it reaches %s\n", f.listeners[0].Addr(), f.to)
		}
	}
	err := a.print(texts, func(w io.Writer) {
		for _, t := range texts {
			fmt.Fprintf(w, "forwarding %s to %s\n", strings.Join(t.Listen, " and "), t.To)
		}
	})
	if err != nil {
		return err
	}
	out := &forwardLog{w: a.stderr}
	var running sync.WaitGroup
	for _, f := range pairs {
		for _, ln := range f.listeners {
			running.Go(func() { f.accept(ctx, ln, c, out, &running) })
		}
	}
	<-ctx.Done()
	for _, f := range pairs {
		f.close()
	}
	running.Wait()
	return nil
}

// listen opens the port, on loopback of both families if no address is given and as far as the host has both.
func (f *forwarding) listen() error {
	if f.local.Addr().IsValid() {
		return f.listenOn(f.local)
	}
	if err := f.listenOn(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), f.local.Port())); err != nil {
		return err
	}
	port := f.listeners[0].Addr().(*net.TCPAddr).AddrPort().Port()
	err := f.listenOn(netip.AddrPortFrom(netip.IPv6Loopback(), port))
	if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) || f.local.Port() == 0 {
		return nil // without IPv6; and a port that was free in one family need not be in the other
	}
	return err
}

func (f *forwarding) listenOn(at netip.AddrPort) error {
	network := "tcp"
	if at.Addr().Is4() { // Go would open 0.0.0.0 for IPv6 as well
		network = "tcp4"
	}
	ln, err := net.ListenTCP(network, net.TCPAddrFromAddrPort(at))
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return api.Errorf(api.CodeInUse, "port %v is taken: choose another for %s, or 0 for any free one (%w)", at, f.to, err)
	case errors.Is(err, syscall.EACCES):
		return api.Errorf(api.CodeDenied, "port %v is for root: choose one from 1024 up, or lower net.ipv4.ip_unprivileged_port_start (%w)", at, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return api.Errorf(api.CodeInvalid, "%v is not an address of this host (see `ip address`): listen for %s on one that is, or on loopback by naming a port alone (%w)", at.Addr(), f.to, err)
	case err != nil:
		return fmt.Errorf("listening for %s: %w", f.to, err)
	}
	f.listeners = append(f.listeners, ln)
	return nil
}

func (f *forwarding) close() {
	for _, ln := range f.listeners {
		ln.Close()
	}
}

// accept serves one port until it is closed.
func (f *forwarding) accept(ctx context.Context, ln *net.TCPListener, c *api.Client, out *forwardLog, running *sync.WaitGroup) {
	pause := time.Duration(0)
	for {
		conn, err := ln.AcceptTCP()
		switch {
		case err == nil:
			pause = 0
			running.Go(func() { f.carry(ctx, conn, c, out) })
			continue
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second) // too many open files, say: it passes
		out.line("%v: %v", ln.Addr(), err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// carry passes one connection on. Whoever made it sees a reset where the container refuses it: it was accepted before we could know.
func (f *forwarding) carry(ctx context.Context, conn *net.TCPConn, c *api.Client, out *forwardLog) {
	s, err := c.Dial(ctx, f.to)
	if err != nil {
		if ctx.Err() == nil {
			out.line("%v: %v", conn.RemoteAddr(), err)
		}
		relay.Reset(conn)
		return
	}
	_ = relay.Join(ctx, conn, s) // whoever broke it knows, and the other was reset
}

// forwardLog writes whole lines from many goroutines.
type forwardLog struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *forwardLog) line(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintf(l.w, "rootless-ovl: connection of "+format+"\n", args...)
}
