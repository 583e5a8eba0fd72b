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
// Queries get an eighth of it and echo flows a sixteenth. TCP and UDP share the rest, of which each may take all but an eighth, and a
// container three quarters.
func (l *Limits) fitDescriptors() (cut bool) {
	budget := l.Descriptors - min(max(reservedDescriptors, l.Descriptors/4), l.Descriptors/2)
	if l.TCPFlows+l.UDPFlows+l.EchoFlows+l.DNSQueries <= budget {
		return false
	}
	l.DNSQueries = max(1, min(l.DNSQueries, budget/8))
	echo := max(1, min(l.EchoFlows, budget/16))
	if echo < l.EchoFlows { // of which a container has a quarter, as with the defaults
		l.EchoFlows, l.EchoFlowsEach = echo, max(1, min(l.EchoFlowsEach, echo/4))
	}
	l.shared = max(2, budget-l.DNSQueries-echo)
	l.sharedEach = max(1, l.shared*3/4)
	most := max(1, l.shared-l.shared/8)
	l.TCPFlows, l.TCPFlowsEach = min(l.TCPFlows, most), min(l.TCPFlowsEach, l.sharedEach)
	l.UDPFlows, l.UDPFlowsEach = min(l.UDPFlows, most), min(l.UDPFlowsEach, l.sharedEach)
	// Half-open connections are among them, and leave room for those that are open.
	l.TCPHalfOpen = max(1, min(l.TCPHalfOpen, l.shared/4))
	l.TCPHalfOpenEach = max(1, min(l.TCPHalfOpenEach, l.shared/8))
	return true
}

// logCut says that fewer flows than the defaults fit.
func (l *Limits) logCut(log *slog.Logger) {
	log.Warn("the limit on open files lets the gateway carry fewer flows of containers than its defaults",
		"open_files", l.Descriptors, "tcp_flows", l.TCPFlows, "udp_flows", l.UDPFlows, "both", l.shared, "echo_flows", l.EchoFlows,
		"each_container_tcp", l.TCPFlowsEach, "each_container_udp", l.UDPFlowsEach, "each_container_both", l.sharedEach,
		"wanted_open_files", enoughDescriptors, "remedy", "raise the hard limit: LimitNOFILE=65536 in the systemd unit, or `ulimit -Hn 65536` as root before it starts")
}
