// This file answers what supervisors ask over HTTP, at flanneld's paths and in its words (main.go, mustRunHealthz): does the
// node run, and is it ready. It is open to everybody who reaches the port and says nothing else.

package node

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"

	"golang.org/x/sys/unix"
)

// listenHealth opens the port of the health checks; nil if none is wanted. The caller has api.Serve close it.
func (n *Node) listenHealth() (net.Listener, error) {
	if !n.cfg.Healthz.IsValid() {
		return nil, nil
	}
	ln, err := n.givenTCP(givenHealth, n.cfg.Healthz)
	if ln == nil && err == nil {
		ln, err = listenTCP(n.cfg.Healthz)
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("health checks: %v is taken: choose another --healthz-port", n.cfg.Healthz)
	case err != nil:
		return nil, fmt.Errorf("health checks: %w: choose another --healthz-ip or --healthz-port", err)
	}
	n.log.Info("health checks", "addr", ln.Addr())
	n.health = ln
	n.listensOn(ln.Addr().(*net.TCPAddr).AddrPort(), "its health checks (--healthz-port)")
	return ln, nil
}

func listenTCP(at netip.AddrPort) (*net.TCPListener, error) {
	return net.ListenTCP(listenNetwork(at.Addr()), net.TCPAddrFromAddrPort(at))
}

// listenNetwork is TCP of an address's family: Go would open 0.0.0.0 for IPv6 as well. :: is both families.
func listenNetwork(a netip.Addr) string {
	if a.Is4() {
		return "tcp4"
	}
	return "tcp"
}

// healthChecks answers /healthz for as long as the node runs, and /readyz when a subnet is leased (now or, while the store
// is away, by the last run) and subnet.env tells of it.
func (n *Node) healthChecks() http.Handler {
	answer := func(w http.ResponseWriter, status int, text string) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, text) // who hangs up does not want to know
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, "flanneld is running")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		n.mu.Lock()
		ready := n.open
		n.mu.Unlock()
		if ready {
			answer(w, http.StatusOK, "flanneld is ready")
			return
		}
		answer(w, http.StatusServiceUnavailable, "flanneld is not ready yet")
	})
	return mux
}
