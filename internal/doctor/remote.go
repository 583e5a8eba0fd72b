// This file is the checks of what is reached over the network: etcd, its clock, and the peers.

package doctor

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
)

const (
	// maxSkew is how far clocks may be apart before certificates and leases in logs get confusing.
	maxSkew = 30 * time.Second
	// What the encapsulations add to a packet, in bytes: an IPv4 and a UDP header, and a VXLAN and an Ethernet header.
	udpOverhead   = 20 + 8
	vxlanOverhead = udpOverhead + 8 + 14
	// minProbe is the smallest IP packet, in bytes, that is looked for on a path.
	minProbe = 576
)

// etcd asks for the endpoint's version, which needs no login, and compares the clock with the answer's Date.
func (h host) etcd(ctx context.Context, endpoint string, conf *tls.Config, timeout time.Duration) []Check {
	id, title := "etcd", "etcd can be reached at "+endpoint
	clock := func(why string) Check { return skip("clock", "the clock agrees with "+endpoint, why) }
	u, err := parseEndpoint(endpoint)
	if err != nil {
		return []Check{bad(id, title, err.Error(), "give it as http://HOST:2379 or https://HOST:2379"), clock("etcd was not reached")}
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	transport := &http.Transport{DialContext: h.dial, TLSClientConfig: conf, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.JoinPath("version").String(), nil)
	if err != nil {
		return []Check{bad(id, title, err.Error(), "give it as http://HOST:2379 or https://HOST:2379"), clock("etcd was not reached")}
	}
	sent := h.now()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		detail, remedy := etcdTrouble(u, err)
		return []Check{bad(id, title, detail, remedy), clock("etcd was not reached")}
	}
	resp.Body.Close()
	got := h.now()
	reached := good(id, title, "it answers (no login was tried: user, password and rights are not looked at)")
	switch {
	case resp.StatusCode == http.StatusOK:
	case resp.StatusCode == http.StatusBadRequest && u.Scheme == "http":
		reached = bad(id, title, "it does not speak plain HTTP", "give the endpoint as https://"+u.Host)
	default:
		reached = bad(id, title, "it answers "+resp.Status+" to a question for its version", "see whether this is the client port of etcd (2379 unless set otherwise)")
	}
	date, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return []Check{reached, clock("etcd does not say its time")}
	}
	// The date has whole seconds and was written between the two readings of our clock.
	skew := time.Duration(0)
	if early := sent.Sub(date.Add(time.Second)); early > 0 {
		skew = early
	} else if late := date.Sub(got); late > 0 {
		skew = -late
	}
	title = "the clock agrees with " + endpoint
	if skew.Abs() <= maxSkew {
		return []Check{reached, good("clock", title, "within "+maxSkew.String())}
	}
	word := "ahead"
	if skew < 0 {
		word = "behind"
	}
	return []Check{reached, warn("clock", title, fmt.Sprintf("this host is %v %s: certificates may seem expired or not yet valid", skew.Abs().Round(time.Second), word),
		"as root: timedatectl set-ntp true (on the host that is wrong)")}
}

func parseEndpoint(endpoint string) (*url.URL, error) {
	if !strings.Contains(endpoint, "://") {
		endpoint = "http://" + endpoint
	}
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, fmt.Errorf("not an endpoint: %w", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("%q is not an endpoint of etcd", endpoint)
	}
	return u, nil
}

// etcdTrouble puts into words why an endpoint did not answer.
func etcdTrouble(u *url.URL, err error) (detail, remedy string) {
	var cert *tls.CertificateVerificationError
	var op *net.OpError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &cert):
		return cert.Error(), "give the authority that signed etcd's certificate (--etcd-cafile), and an endpoint that is named in the certificate"
	case errors.As(err, &op) && op.Op == "remote error":
		return "it refuses us: " + op.Err.Error(), "give the client certificate that etcd wants (--etcd-certfile and --etcd-keyfile)"
	case errors.As(err, &record):
		return "it does not speak TLS", "give the endpoint as http://" + u.Host
	case u.Scheme == "http" && strings.Contains(err.Error(), "malformed HTTP response"), u.Scheme == "http" && strings.Contains(err.Error(), "EOF"):
		return "it does not speak plain HTTP", "give the endpoint as https://" + u.Host
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens there (connection refused)", "start etcd, or see whether it listens on this address (--listen-client-urls of etcd, --listen-etcd of another node's `up`)"
	case errors.Is(err, context.DeadlineExceeded):
		return "no answer in time", "see whether a firewall between the hosts drops TCP to port " + u.Port()
	default:
		return err.Error(), "see whether the name and the port are right, and whether there is a route to it"
	}
}

// peer knocks at the peer's port, and looks for the largest datagram that reaches its host.
func (h host) peer(ctx context.Context, peer netip.AddrPort, timeout time.Duration) []Check {
	return []Check{h.peerPort(ctx, peer, timeout), h.peerMTU(ctx, peer, timeout)}
}

func (h host) peerPort(ctx context.Context, peer netip.AddrPort, timeout time.Duration) Check {
	id, title := "peer-port", fmt.Sprintf("the UDP port of peer %v is open", peer)
	err := h.knock(ctx, peer, timeout)
	switch {
	case err == nil:
		return good(id, title, "nothing refused our datagrams")
	case errors.Is(err, syscall.ECONNREFUSED):
		return bad(id, title, "the host refuses it (port unreachable)", fmt.Sprintf("start the node there, or open UDP port %d in its firewall", peer.Port()))
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return bad(id, title, fmt.Sprintf("no way to the host (%v)", err), fmt.Sprintf("see whether %v is up and reachable from here (its --public-ip may be wrong), and that no firewall rejects UDP port %d", peer.Addr(), peer.Port()))
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return bad(id, title, fmt.Sprintf("this host does not let us send there (%v)", err), fmt.Sprintf("allow outgoing UDP to port %d in this host's firewall", peer.Port()))
	default:
		return skip(id, title, err.Error())
	}
}

// peerMTU compares the MTU of the interface with the largest ping that is answered. Nodes find out by themselves what a path
// carries, so a narrow one is worth a word only: its packets are smaller than they could be, and a peer that answers no probe
// is lost behind it.
func (h host) peerMTU(ctx context.Context, peer netip.AddrPort, timeout time.Duration) Check {
	id, title := "peer-mtu", fmt.Sprintf("datagrams of full size reach peer %v", peer.Addr())
	full, err := h.mtu(peer)
	if err != nil {
		return skip(id, title, err.Error())
	}
	full = min(full, 65535)
	wait := max(timeout/6, 100*time.Millisecond)
	answered := func(size int) (bool, error) {
		for range 2 {
			if ok, err := h.echo(ctx, peer.Addr(), size, wait); ok || err != nil {
				return ok, err
			}
		}
		return false, nil
	}
	low := min(minProbe, full)
	asked := time.Now()
	ok, err := answered(low)
	wait = min(wait, 10*time.Since(asked)+50*time.Millisecond)
	switch {
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return skip(id, title, "pings are not allowed here (see ping-group-range)")
	case err != nil:
		return skip(id, title, "ping: "+err.Error())
	case !ok:
		return skip(id, title, "the host does not answer pings, so nothing is known of the path")
	}
	if ok, err := answered(full); ok && err == nil {
		return good(id, title, fmt.Sprintf("%d bytes, the MTU of the interface, get through", full))
	}
	// low gets through, high does not.
	high := full
	for high-low > 1 {
		mid := (low + high) / 2
		if ok, err := answered(mid); ok && err == nil {
			low = mid
		} else if ctx.Err() != nil {
			return skip(id, title, "interrupted")
		} else {
			high = mid
		}
	}
	return warn(id, title, fmt.Sprintf("only %d bytes get through, the interface has %d", low, full),
		fmt.Sprintf("none is needed between nodes that answer each other's probes: they send packets of %d bytes at most, of %d in a vxlan network (PATH MTU in `rootless-ovl peers`);\n"+
			"if connections hang all the same, as root give the interface on both hosts the MTU of the path: ip link set dev INTERFACE mtu %d; restart the nodes", low-udpOverhead, low-vxlanOverhead, low))
}
