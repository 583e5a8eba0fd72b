// This file keeps the flows within the descriptors that the process may have open: each flow holds a socket of the host, and
// a process without descriptors serves nobody.

package stack

import (
	"log/slog"
	"math"

	"golang.org/x/sys/unix"
)

const (
	// reservedDescriptors is the least that is left for what is no flow: the API, TAPs and exits of 200 containers, the store,
	// files. Where more descriptors are allowed a quarter of them is left, where fewer than twice as many are, half.
	reservedDescriptors = 512
	// enoughDescriptors is a round number with which the default limits are not cut; it is told to people. The doctor has it
	// as well.
	enoughDescriptors = 65536
)

// openFiles is RLIMIT_NOFILE. At the start of a Go program package syscall raises the soft limit to the hard one.
func openFiles() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Cur > math.MaxInt32 {
		return math.MaxInt32
	}
	return int(l.Cur)
}

// fitDescriptors cuts l to what Descriptors leave for flows, the shares of containers with them, and says whether it had to.
// Queries get an eighth of it and echo flows a sixteenth, then TCP and UDP divide the rest.
func (l *Limits) fitDescriptors() (cut bool) {
	budget := l.Descriptors - min(max(reservedDescriptors, l.Descriptors/4), l.Descriptors/2)
	if l.TCPFlows+l.UDPFlows+l.EchoFlows+l.DNSQueries <= budget {
		return false
	}
	l.DNSQueries = max(1, min(l.DNSQueries, budget/8))
	echo := max(1, min(l.EchoFlows, budget/16))
	rest := budget - l.DNSQueries - echo
	// Half for each of the two, or what the other does not want.
	tcp := max(1, min(l.TCPFlows, max(rest/2, rest-l.UDPFlows)))
	udp := max(1, min(l.UDPFlows, max(rest/2, rest-l.TCPFlows)))
	// Of what is cut a container may take no more than half, of echo flows a quarter, as with the defaults.
	if tcp < l.TCPFlows {
		l.TCPFlowsEach = max(1, min(l.TCPFlowsEach, tcp/2))
		// Half-open connections are among them, and leave room for those that are open.
		l.TCPHalfOpen = max(1, min(l.TCPHalfOpen, tcp/2))
		l.TCPHalfOpenEach = max(1, min(l.TCPHalfOpenEach, tcp/4))
	}
	if udp < l.UDPFlows {
		l.UDPFlowsEach = max(1, min(l.UDPFlowsEach, udp/2))
	}
	if echo < l.EchoFlows {
		l.EchoFlowsEach = max(1, min(l.EchoFlowsEach, echo/4))
	}
	l.TCPFlows, l.UDPFlows, l.EchoFlows = tcp, udp, echo
	return true
}

// logCut says that fewer flows than the defaults fit.
func (l *Limits) logCut(log *slog.Logger) {
	log.Warn("the limit on open files lets the gateway carry fewer flows of containers than its defaults",
		"open_files", l.Descriptors, "tcp_flows", l.TCPFlows, "udp_flows", l.UDPFlows, "echo_flows", l.EchoFlows,
		"each_container_tcp", l.TCPFlowsEach, "each_container_udp", l.UDPFlowsEach,
		"wanted_open_files", enoughDescriptors, "remedy", "raise the hard limit: LimitNOFILE=65536 in the systemd unit, or `ulimit -Hn 65536` as root before it starts")
}
