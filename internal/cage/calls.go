// This file is the list of system calls.

package cage

import (
	"os"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// Calls whatever their arguments are, those of the packet path first: kernels before 5.11 go through the list for every call.
var plainCalls = []string{
	"read", "write", "readv", "writev", "recvmsg", "sendmsg", "recvmmsg", "sendmmsg", "epoll_pwait", "futex", "recvfrom", "sendto",
	"splice", "nanosleep", "clock_nanosleep", "ppoll", "epoll_ctl", "close",

	// Go's runtime. The vDSO calls clock_gettime and gettimeofday where the machine's clock cannot be read without the kernel.
	"madvise", "munmap", "mremap", "mincore", "brk", "sched_yield", "sched_getaffinity", "sigaltstack", "rt_sigaction", "rt_sigprocmask",
	"rt_sigreturn", "restart_syscall", "gettid", "getpid", "getppid", "exit", "exit_group", "clock_gettime", "clock_getres", "gettimeofday",
	"getrandom", "rseq", "set_robust_list", "set_tid_address", "epoll_create1", "eventfd2", "pipe2", "getrusage",

	// Files.
	"openat", "fstat", "statx", "statfs", "fstatfs", "lseek", "pread64", "pwrite64", "preadv", "pwritev", "fsync", "fdatasync",
	"ftruncate", "fallocate", "flock", "fcntl", "dup", "dup3", "getdents64", "unlinkat", "mkdirat", "renameat", "renameat2", "readlinkat",
	"fchmod", "fchmodat", "faccessat", "utimensat", "getcwd", "umask", "sendfile", "copy_file_range", "fadvise64",

	// Sockets. Which there are is said below.
	"bind", "listen", "accept4", "connect", "getsockname", "getpeername", "getsockopt", "setsockopt", "shutdown",

	// Processes: the children that nsutil forks are waited for, others watched.
	"wait4", "waitid", "pidfd_open", "getuid", "geteuid", "getgid", "getegid", "capget", "uname", "sysinfo", "getrlimit",
}

// probed are calls that a program tries first, and does without where the kernel does not have them.
var probed = []string{"clone3", "openat2", "faccessat2", "fchmodat2", "epoll_pwait2", "futex_waitv", "close_range", "cachestat", "mseal", "membarrier"}

// namespaces are all that clone(2) can make; time namespaces are made by clone3 and unshare only.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// ioctls are the requests that are let through: TAPs, namespaces, how much a socket holds. None of a terminal's is among them (TIOCSTI).
var ioctls = []uint64{
	unix.TUNSETIFF, unix.TUNGETIFF, unix.TUNSETPERSIST, unix.TUNSETOWNER, unix.TUNSETOFFLOAD, unix.TUNSETVNETHDRSZ, unix.TUNGETVNETHDRSZ, unix.TUNGETDEVNETNS,
	unix.NS_GET_USERNS, unix.NS_GET_PARENT, unix.NS_GET_NSTYPE, unix.NS_GET_OWNER_UID,
	unix.TIOCINQ, siocATMark,
}

const (
	siocATMark     = 0x8905     // SIOCATMARK, asm-generic/sockios.h
	prSetVMA       = 0x53564d41 // PR_SET_VMA, linux/prctl.h: Go's runtime names its memory
	lastPID        = 1<<31 - 1
	socketFlags    = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	rlimitFiles    = unix.RLIMIT_NOFILE // the only limit that Go's runtime changes
	ownProcess     = 0
	argDomain      = 0
	argType        = 1
	argProtocol    = 2
	argProtection  = 2 // of mmap and mprotect
	argNamespaces  = 1 // of setns
	argSignal      = 1 // of kill
	argOptionFirst = 0
)

func equal(arg uint32, value uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.Equal, Value: value}
}

func without(arg uint32, bits uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.BitsNotSet, Value: bits}
}

// conditions are the calls that are let through with some arguments only.
func conditions() []seccomp.NameWithConditions {
	var all []seccomp.NameWithConditions
	when := func(call string, c ...seccomp.Condition) {
		all = append(all, seccomp.NameWithConditions{Name: call, Conditions: c})
	}
	// Nothing becomes a program that was not one when the process started.
	when("mmap", without(argProtection, unix.PROT_EXEC))
	when("mprotect", without(argProtection, unix.PROT_EXEC))
	// Threads, and forks that stay in our namespaces until they join those of a container.
	when("clone", without(argOptionFirst, namespaces))
	when("setns", equal(argNamespaces, unix.CLONE_NEWUSER))
	when("setns", equal(argNamespaces, unix.CLONE_NEWNET))

	for _, family := range []uint64{unix.AF_INET, unix.AF_INET6} {
		for _, kind := range []uint64{unix.SOCK_STREAM, unix.SOCK_DGRAM} { // not SOCK_RAW, of which a container's root has the right
			for _, flags := range []uint64{0, unix.SOCK_CLOEXEC, unix.SOCK_NONBLOCK, socketFlags} {
				when("socket", equal(argDomain, family), equal(argType, kind|flags))
			}
		}
	}
	when("socket", equal(argDomain, unix.AF_UNIX))
	when("socket", equal(argDomain, unix.AF_NETLINK), equal(argProtocol, unix.NETLINK_ROUTE))
	when("socket", equal(argDomain, unix.AF_NETLINK), equal(argProtocol, unix.NETLINK_NETFILTER))
	when("socketpair", equal(argDomain, unix.AF_UNIX))

	// Go's runtime interrupts its threads; a crash is a signal to itself; a child that hangs is killed, and never all processes that there are.
	self := uint64(os.Getpid())
	when("tgkill", equal(0, self))
	when("kill", equal(0, self))
	when("kill", equal(argSignal, uint64(unix.SIGKILL)),
		seccomp.Condition{Argument: 0, Operation: seccomp.GreaterThan, Value: 1},
		seccomp.Condition{Argument: 0, Operation: seccomp.LessOrEqual, Value: lastPID})

	for _, option := range []uint64{unix.PR_SET_PDEATHSIG, prSetVMA, unix.PR_GET_NO_NEW_PRIVS} {
		when("prctl", equal(argOptionFirst, option))
	}
	when("prlimit64", equal(0, ownProcess), equal(1, rlimitFiles))
	for _, request := range ioctls {
		when("ioctl", equal(1, request))
	}
	return all
}

// daemonCalls is the filter of the daemon.
func daemonCalls() seccomp.Policy {
	return seccompPolicy(slices.Concat(plainCalls, archCalls), conditions())
}

// openerCalls is the filter of the opener: it reads and writes its socket, follows paths, opens files and makes one symbolic link.
func openerCalls() seccomp.Policy {
	calls := slices.DeleteFunc(slices.Concat(plainCalls, archCalls, openerFiles), func(call string) bool { return slices.Contains(notOpeners, call) })
	var some []seccomp.NameWithConditions
	for _, c := range conditions() {
		switch c.Name {
		case "mmap", "mprotect", "tgkill", "prctl", "prlimit64":
			some = append(some, c)
		}
	}
	some = append(some,
		seccomp.NameWithConditions{Name: "clone", Conditions: seccomp.ArgumentConditions{
			without(argOptionFirst, namespaces),
			{Argument: argOptionFirst, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD},
		}},
		seccomp.NameWithConditions{Name: "ioctl", Conditions: seccomp.ArgumentConditions{equal(1, unix.NS_GET_NSTYPE)}},
		// Whether it is another user's is asked without a signal.
		seccomp.NameWithConditions{Name: "kill", Conditions: seccomp.ArgumentConditions{equal(argSignal, 0)}})
	return seccompPolicy(calls, some)
}

var (
	openerFiles = []string{"openat2", "symlinkat"} // openat2: no link leads out of the root of a process
	// notOpeners are the daemon's calls that the opener has no use for.
	notOpeners = []string{
		"bind", "listen", "accept4", "connect", "sendto", "recvfrom", "sendmmsg", "recvmmsg", "splice", "sendfile", "copy_file_range", "setsockopt",
		"fallocate", "ftruncate", "flock", "fsync", "fdatasync", "renameat", "renameat2", "fchmod", "fchmodat", "utimensat", "wait4", "waitid",
	}
)

func seccompPolicy(calls []string, conditions []seccomp.NameWithConditions) seccomp.Policy {
	const absent = seccomp.ActionErrno | seccomp.Action(unix.ENOSYS)
	return seccomp.Policy{
		DefaultAction: seccomp.ActionErrno, // EPERM
		Syscalls: []seccomp.SyscallGroup{
			{Names: calls, NamesWithCondtions: conditions, Action: seccomp.ActionAllow},
			{Names: slices.DeleteFunc(slices.Clone(probed), func(call string) bool { return slices.Contains(calls, call) }), Action: absent},
		},
	}
}
