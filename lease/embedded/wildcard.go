// This file is the server on every address of the host: the listener, what it hands on to the member, and what the member tells others of its
// addresses. etcd itself would open IPv6 too where 0.0.0.0 is asked for.

package embedded

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/relay"
)

// front is a listener on all addresses whose connections are joined with the member, which listens on a port of the loopback.
type front struct {
	ln     net.Listener
	member string // host:port

	cancel context.CancelFunc
	ended  sync.WaitGroup
}

// listenEverywhere opens a front at 0.0.0.0, for IPv4 alone, or at ::, for both families.
func listenEverywhere(ctx context.Context, at netip.AddrPort) (*front, error) {
	network := "tcp"
	if at.Addr().Is4() {
		network = "tcp4"
	}
	var c net.ListenConfig
	ln, err := c.Listen(ctx, network, at.String())
	if err != nil {
		return nil, err
	}
	return &front{ln: ln}, nil
}

// addr is where it listens, as it was asked for and with the port that was picked.
func (f *front) addr(asked netip.Addr) netip.AddrPort {
	port := f.ln.Addr().(*net.TCPAddr).AddrPort().Port() //nolint:errcheck // the listener is of TCP
	return netip.AddrPortFrom(asked, port)
}

// serve joins clients with the member at that address until close.
func (f *front) serve(member string) {
	ctx, cancel := context.WithCancel(context.Background())
	f.member, f.cancel = member, cancel
	f.ended.Go(func() {
		for pause := time.Duration(0); ; {
			client, err := f.ln.Accept()
			switch {
			case errors.Is(err, net.ErrClosed):
				return
			case err != nil: // too many open files, say: it passes
				pause = min(max(2*pause, 5*time.Millisecond), time.Second)
				time.Sleep(pause)
				continue
			}
			pause = 0
			f.ended.Go(func() { f.join(ctx, client.(*net.TCPConn)) }) //nolint:errcheck // the listener is of TCP
		}
	})
}

func (f *front) join(ctx context.Context, client *net.TCPConn) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", f.member)
	if err != nil {
		relay.Reset(client)
		return
	}
	_ = relay.Join(ctx, client, conn.(*net.TCPConn)) //nolint:errcheck // whoever broke it knows, and the other was reset
}

// close ends the listener and all connections.
func (f *front) close() {
	_ = f.ln.Close() // it is of no more use in any case
	if f.cancel != nil {
		f.cancel()
	}
	f.ended.Wait()
}

// advertised are the URLs by which others reach a server that listens at u, all but loopback and link-local ones: what clients of the member
// list learn, and nodes close to containers (lease.Client.MemberAddrs). Where there is none, it is u.
func advertised(u url.URL, at netip.AddrPort) []url.URL {
	if !at.Addr().IsUnspecified() {
		return []url.URL{u}
	}
	have, err := net.InterfaceAddrs()
	if err != nil {
		return []url.URL{u}
	}
	var all []url.URL
	for _, h := range have {
		p, err := netip.ParsePrefix(h.String())
		if a := p.Addr(); err == nil && !a.IsLoopback() && !a.IsLinkLocalUnicast() && (a.Is4() || at.Addr().Is6()) {
			one := u
			one.Host = netip.AddrPortFrom(a, at.Port()).String()
			all = append(all, one)
		}
	}
	if len(all) == 0 {
		return []url.URL{u}
	}
	return all
}
