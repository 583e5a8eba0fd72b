// This file is what a Gateway is told at its start: addresses, limits, timeouts, and their defaults.

package stack

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/rootless-ovl/rootless-ovl/internal/packet"
)

// Config is what New needs. Addresses, MTU and Exit are required.
type Config struct {
	// Addresses are the gateway's own, the address that containers use as gateway first (the source of ICMP errors).
	Addresses []netip.Addr
	// SubnetLen and IPv6SubnetLen are the lengths of the prefixes that each node has for its containers, the first two addresses of which are the
	// node's own: its router's, as it says in ICMP errors. Zero: not known, and only containers themselves are believed.
	SubnetLen, IPv6SubnetLen int
	// MTU of the container's link in bytes: what a packet that is not a superpacket may have.
	MTU int
	// Exit takes packets for containers. It is called by one goroutine at a time: that of Run, or one that ends a turn (Begin, Attend); the
	// packets and their memory are lent until it returns. It must not block.
	Exit func([]*packet.Packet)
	// Attend has poll called, by one goroutine at a time, whenever the descriptor fd is readable: by one that is awake often. When leave has
	// returned it is not called any more. Nil: the stack has a goroutine for it.
	Attend func(fd int, poll func()) (leave func(), err error)
	// Log gets the few events worth a line; nil is slog.Default().
	Log *slog.Logger

	// HostLoopback opens the host's loopback: the gateway's first address of each family, on every port but 53, leads to
	// 127.0.0.1 or ::1, and 127.0.0.0/8 and ::1 are not refused.
	HostLoopback bool
	// LinkLocal opens 169.254.0.0/16 and fe80::/10 with the metadata services of clouds in them, and fd00:ec2::254.
	LinkLocal bool

	// Outbound is where what containers send leaves the host.
	Outbound Outbound

	// ResolvConf names the host's resolvers; "" is /etc/resolv.conf.
	ResolvConf string
	// Limits and Timeouts: a zero field takes its default.
	Limits   Limits
	Timeouts Timeouts
}

// Limits bound what containers can make the gateway hold. A zero field takes the default in its comment. New cuts them to
// what Descriptors allow.
type Limits struct {
	TCPFlows    int // connections, half-open ones included: 20480
	TCPHalfOpen int // connections being dialled or in the handshake: 4096
	UDPFlows    int // 24576
	EchoFlows   int // 1024
	DNSQueries  int // queries in flight: 512

	// The share that one container may take of each, so that one cannot starve the others.
	TCPFlowsEach    int // 12288
	TCPHalfOpenEach int // 512; one more takes the place of the oldest if that is stale
	UDPFlowsEach    int // 12288
	EchoFlowsEach   int // 256

	// What TCP and UDP flows may be together, all and those of one container, if Descriptors are too few for the limits of both; else 0.
	shared, sharedEach int

	// TCPBuffers is the memory in bytes that connections may take for what one side has sent and the other does not take yet: 256 MiB.
	// Each begins with an equal part of one half, and grows while less than a half is lent. A container is lent no more than a half, and its
	// connections grow no further than to a quarter; 8 KiB a connection has in any case.
	TCPBuffers int

	// ExitQueue is the length of the exit queue in packets: 4096.
	ExitQueue int

	// Descriptors is how many files the process may have open: RLIMIT_NOFILE. Every flow and query holds one; a quarter of them,
	// at least 512, is left alone.
	Descriptors int
}

// Timeouts end what is idle. A zero field takes the default in its comment.
type Timeouts struct {
	Dial   time.Duration // for a host to accept a connection: 60 s
	Stale  time.Duration // age from which a half-open connection makes room for another of its container: 1 s
	UDP    time.Duration // UDP flow that has had no reply yet, or whose last datagram came within two seconds of its first: 30 s
	UDPDNS time.Duration // UDP flow to port 53: 10 s
	// UDPConversation is for a UDP flow that goes on in both directions: 180 s.
	UDPConversation time.Duration
	Echo            time.Duration // echo flow: 30 s
	TCPIdle         time.Duration // idle time after which a container is asked whether it still has the connection: 2 min
	TCPLast         time.Duration // for a container to take something of what is left for it when both sides have ended a connection: 90 s
}

func orDefault[T ~int | ~int64](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

func (l *Limits) setDefaults() {
	orDefault(&l.TCPFlows, 20480)
	orDefault(&l.TCPHalfOpen, 4096)
	orDefault(&l.UDPFlows, 24576)
	orDefault(&l.EchoFlows, 1024)
	orDefault(&l.DNSQueries, 512)
	orDefault(&l.TCPFlowsEach, 12288)
	orDefault(&l.TCPHalfOpenEach, 512)
	orDefault(&l.UDPFlowsEach, 12288)
	orDefault(&l.EchoFlowsEach, 256)
	orDefault(&l.TCPBuffers, 256<<20)
	orDefault(&l.ExitQueue, 4096)
	if l.Descriptors <= 0 {
		l.Descriptors = openFiles()
	}
}

func (t *Timeouts) setDefaults() {
	orDefault(&t.Dial, 60*time.Second)
	orDefault(&t.Stale, time.Second)
	orDefault(&t.UDP, 30*time.Second)
	orDefault(&t.UDPConversation, 180*time.Second)
	orDefault(&t.UDPDNS, 10*time.Second)
	orDefault(&t.Echo, 30*time.Second)
	orDefault(&t.TCPIdle, 2*time.Minute)
	orDefault(&t.TCPLast, 90*time.Second)
}

// Bounds of Config.MTU in bytes. Below 576 a host need not accept what we send unfragmented (RFC 791); IPv6 needs 1280.
const (
	minMTU     = 576
	minMTUIPv6 = 1280
	maxMTU     = 65535
)

func (c *Config) validate() error {
	if c.Exit == nil {
		return errors.New("stack: Exit is missing: packets for containers have nowhere to go")
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		return fmt.Errorf("stack: MTU %d is not between %d and %d", c.MTU, minMTU, maxMTU)
	}
	if err := c.Outbound.validate(); err != nil {
		return err
	}
	return validateAddresses(c.Addresses, c.MTU)
}

func validateAddresses(addrs []netip.Addr, mtu int) error {
	if len(addrs) == 0 {
		return errors.New("stack: no address: the gateway needs at least the one that containers use as their gateway")
	}
	for _, a := range addrs {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Is4In6() {
			return fmt.Errorf("stack: %v cannot be an address of the gateway", a)
		}
		if a.Is6() && mtu < minMTUIPv6 {
			return fmt.Errorf("stack: MTU %d is too small for %v: IPv6 needs %d", mtu, a, minMTUIPv6)
		}
	}
	return nil
}
