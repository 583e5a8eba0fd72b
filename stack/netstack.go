// This file makes gVisor's stack, sets its options, and takes it down.

package stack

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// nicID is the stack's only interface.
const nicID tcpip.NICID = 1

// gatewayTTL is the IP TTL and hop limit of what the gateway sends.
const gatewayTTL = 64

const (
	// timeWait is short because the path is a TAP: no segment wanders in it for a minute. endTimeWait does the rest.
	timeWait = 2 * time.Second
)

// netstack is gVisor's stack during one Run, with the flows in it.
type netstack struct {
	gw     *Gateway
	count  *counters
	s      *gstack.Stack
	link   *link
	exit   *exitQueue
	flows  *flowTable
	crew   crew
	budget budget
	poller *poller        // of the host's TCP sockets
	conns  *tcp.Forwarder // completes handshakes
	reader *datagramReader
	echo   echoPermission
	errors errorRate

	tended chan struct{} // closed when tend has ended

	ctx    context.Context // done when Run is to end
	cancel context.CancelFunc
}

func newNetstack(g *Gateway) (*netstack, error) {
	ns := &netstack{gw: g, count: &g.count}
	ns.ctx, ns.cancel = context.WithCancel(context.Background())
	ns.exit = newExitQueue(g.cfg.Limits.ExitQueue, ns.count, g.cfg.Exit)
	ns.flows = newFlowTable(&g.cfg.Limits, g.cfg.Timeouts.Stale, ns.count)
	ns.budget.limit = int64(g.cfg.Limits.TCPBuffers)
	ns.tended = make(chan struct{})
	ns.link = &link{exit: ns.exit}
	ns.link.SetMTU(uint32(g.cfg.MTU))
	ns.s = gstack.New(gstack.Options{
		NetworkProtocols: []gstack.NetworkProtocolFactory{
			ipv4.NewProtocolWithOptions(ipv4.Options{AllowExternalLoopbackTraffic: g.cfg.HostLoopback}),
			ipv6.NewProtocolWithOptions(ipv6.Options{AllowExternalLoopbackTraffic: g.cfg.HostLoopback}),
		},
		TransportProtocols: []gstack.TransportProtocolFactory{
			tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	err := ns.configure()
	if err == nil {
		ns.poller, err = newPoller(ns)
	}
	if err == nil {
		if ns.reader, err = newDatagramReader(ns); err != nil {
			_ = ns.poller.file.Close()
		}
	}
	if err != nil {
		ns.s.Destroy()
		ns.cancel()
		return nil, err
	}
	go ns.tend()
	return ns, nil
}

func (ns *netstack) configure() error {
	if err := ns.setTCPOptions(); err != nil {
		return err
	}
	// The accept functions: gVisor calls them for what belongs to none of its endpoints.
	ns.conns = tcp.NewForwarder(ns.s, tcpReceiveBuffer, math.MaxInt32, ns.openTCP)
	ns.s.SetTransportProtocolHandler(tcp.ProtocolNumber, ns.acceptTCP)
	ns.s.SetTransportProtocolHandler(udp.ProtocolNumber, ns.acceptUDP)
	ns.s.SetTransportProtocolHandler(icmp.ProtocolNumber4, ns.acceptEcho)
	ns.s.SetTransportProtocolHandler(icmp.ProtocolNumber6, ns.acceptEcho)

	if err := ns.s.CreateNICWithOptions(nicID, ns.link, gstack.NICOptions{Name: "containers"}); err != nil {
		return fmt.Errorf("stack: create the NIC: %v", err)
	}
	// Promiscuous: packets for any address are taken. Spoofing: they are answered from that address.
	if err := ns.s.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("stack: set promiscuous mode: %v", err)
	}
	if err := ns.s.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("stack: set spoofing: %v", err)
	}
	ns.s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return ns.changeAddresses(nil, *ns.gw.own.Load())
}

func (ns *netstack) setTCPOptions() error {
	sack := tcpip.TCPSACKEnabled(true)
	// gVisor's RACK retransmits for nothing and shrinks the window (tailscale/tailscale#9707), and its cubic lets the
	// window arithmetic overflow (google/gvisor#11632). Reno with SACK does neither.
	recovery := tcpip.TCPRecovery(0)
	cc := tcpip.CongestionControlOption("reno")
	// gVisor's own tuning of buffers is left for that of buffers.go. It is on, and never asked, since the scale of the window follows
	// from the largest buffer then.
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcpMinBuffer, Default: tcpReceiveBuffer, Max: tcpMaxBuffer}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcpMinBuffer, Default: tcpSendBuffer, Max: tcpMaxBuffer}
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &recovery, &cc, &moderate, &wait, &receive, &send} {
		if err := ns.s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("stack: set TCP option %T: %v", o, err)
		}
	}
	return nil
}

// changeAddresses makes the stack answer for what is in now and not for what was only in old.
func (ns *netstack) changeAddresses(old, now []netip.Addr) error {
	for _, a := range now {
		if slices.Contains(old, a) {
			continue
		}
		pa := tcpip.ProtocolAddress{Protocol: header.IPv4ProtocolNumber, AddressWithPrefix: tcpipAddr(a).WithPrefix()}
		if a.Is6() {
			pa.Protocol = header.IPv6ProtocolNumber
		}
		if err := ns.s.AddProtocolAddress(nicID, pa, gstack.AddressProperties{}); err != nil {
			return fmt.Errorf("stack: add address %v: %v", a, err)
		}
	}
	for _, a := range old {
		if slices.Contains(now, a) {
			continue
		}
		if err := ns.s.RemoveAddress(nicID, tcpipAddr(a)); err != nil {
			return fmt.Errorf("stack: remove address %v: %v", a, err)
		}
	}
	return nil
}

// route is the way from one of the addresses we answer for to a container. The caller releases it.
func (ns *netstack) route(from, to netip.Addr) (*gstack.Route, tcpip.Error) {
	proto := header.IPv4ProtocolNumber
	if to.Is6() {
		proto = header.IPv6ProtocolNumber
	}
	return ns.s.FindRoute(nicID, tcpipAddr(from), tcpipAddr(to), proto, false)
}

// tendEvery is how often established connections are looked at.
const tendEvery = 5 * time.Second

// tend looks at the connections now and then, until Run ends.
func (ns *netstack) tend() {
	defer close(ns.tended)
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-ns.ctx.Done():
			return
		case <-tick.C:
		}
		for _, f := range ns.flows.all(kindTCP) {
			if f, ok := f.(*tcpFlow); ok {
				f.tend()
			}
		}
	}
}

// abortPoll is how often shutDown looks for connections that completed a handshake after the last look.
const abortPoll = 10 * time.Millisecond

// shutDown resets every flow, waits for its goroutines, and lets the exit queue run dry: the resets are in it.
func (ns *netstack) shutDown() {
	ns.cancel()
	ns.flows.close()
	ended := make(chan struct{})
	go func() {
		ns.flows.wg.Wait()
		close(ended)
	}()
	for waiting := true; waiting; {
		for _, e := range ns.s.RegisteredEndpoints() {
			e.Abort()
		}
		select {
		case <-ended:
			waiting = false
		case <-time.After(abortPoll):
		}
	}
	<-ns.tended
	ns.poller.stop()
	ns.reader.close()
	ns.crew.close()
	ns.s.Destroy()
	ns.exit.close()
}
