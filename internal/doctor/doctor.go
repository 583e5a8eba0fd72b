// This file is what the command line uses: the checks, their results, and the order they come in.

package doctor

import (
	"context"
	"crypto/tls"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/engine/install"
)

// Status is the result of a check.
type Status string

// What a check can say.
const (
	OK      Status = "ok"
	Warn    Status = "warn"    // something will be missing or slow
	Fail    Status = "fail"    // the overlay cannot work like this
	Skipped Status = "skipped" // does not apply here, or was not asked for; Detail says why
)

// Check is the result of one check.
type Check struct {
	ID     string `json:"id"` // stable
	Title  string `json:"title"`
	Status Status `json:"status"`
	Detail string `json:"detail"`           // what was found, one line
	Remedy string `json:"remedy,omitempty"` // what to do; may have several lines. Only with Warn and Fail.
}

// Options say what to look at beside the host itself. The zero value looks at the host alone.
type Options struct {
	Network   netip.Prefix     // of the overlay: does the host use it for something else?
	Endpoints []string         // of etcd, as URLs or host:port: is it there, and what does its clock say? No login is tried
	TLS       *tls.Config      // for https endpoints; nil: the system's roots
	Peers     []netip.AddrPort // underlay addresses of other nodes: does their port answer, how large may datagrams be?
	Program   string           // path of the program, for the AppArmor profile; "": the running one
	Installed install.Setup    // where install writes on this machine; the zero value: do not look
	Daemon    *Daemon          // what became of asking it; nil: it was not asked
	Timeout   time.Duration    // of each thing that waits for the network; 0: 3 s
}

// Daemon is what the running daemon has said, if there is one.
type Daemon struct {
	Err     error  // why it could not be asked
	Version string // its own
	Ours    string // of the program that asks
	// SandboxOff is why a part of its sandbox is off, by its name: seccomp, landlock, no_new_privs.
	SandboxOff map[string]string
}

// Run makes every check. The checks come in a fixed order; endpoints and peers have one check each.
func Run(ctx context.Context, o Options) []Check {
	return run(ctx, o, realHost())
}

// Failed tells whether any of the checks says Fail.
func Failed(checks []Check) bool {
	for _, c := range checks {
		if c.Status == Fail {
			return true
		}
	}
	return false
}

func run(ctx context.Context, o Options, h host) []Check {
	if o.Timeout <= 0 {
		o.Timeout = 3 * time.Second
	}
	if o.Program == "" {
		o.Program, _ = os.Executable()
	}
	checks := []Check{
		h.tun(), h.appArmor(o.Program), h.usernsClone(), h.maxUserNamespaces(), h.maxNetNamespaces(),
		h.idMapper("newuidmap"), h.idMapper("newgidmap"), h.subIDs("uid"), h.subIDs("gid"),
		h.noNewPrivileges(), h.hidepid(), h.pingGroupRange(), h.socketBuffer("rmem_max"), h.socketBuffer("wmem_max"),
		h.openFiles(), h.sandbox(o.Daemon), h.runtimeDir(), h.linger(), h.overlap(o.Network),
		h.daemon(o), h.daemonVersion(o.Daemon), h.units(o.Installed), h.installedFiles(o.Installed), h.podmanHook(o.Installed), h.dockerPlugin(o.Installed),
	}
	etcd := make([][]Check, max(len(o.Endpoints), 1))
	peers := make([][]Check, max(len(o.Peers), 1))
	var wg sync.WaitGroup
	for i, e := range o.Endpoints {
		wg.Go(func() { etcd[i] = h.etcd(ctx, e, o.TLS, o.Timeout) })
	}
	if len(o.Endpoints) == 0 {
		const why = "no etcd endpoints given (--etcd-endpoints)"
		etcd[0] = []Check{skip("etcd", "etcd can be reached", why), skip("clock", "the clock is right", why)}
	}
	for i, p := range o.Peers {
		wg.Go(func() { peers[i] = h.peer(ctx, p, o.Timeout) })
	}
	if len(o.Peers) == 0 {
		const why = "no peers known: the daemon is not running, or is alone"
		peers[0] = []Check{skip("peer-port", "the UDP port of peers is open", why), skip("peer-mtu", "datagrams of full size reach peers", why)}
	}
	wg.Wait()
	for _, cs := range append(etcd, peers...) {
		checks = append(checks, cs...)
	}
	return checks
}

func good(id, title, detail string) Check {
	return Check{ID: id, Title: title, Status: OK, Detail: detail}
}

func skip(id, title, why string) Check {
	return Check{ID: id, Title: title, Status: Skipped, Detail: why}
}

func warn(id, title, detail, remedy string) Check {
	return Check{ID: id, Title: title, Status: Warn, Detail: detail, Remedy: remedy}
}

func bad(id, title, detail, remedy string) Check {
	return Check{ID: id, Title: title, Status: Fail, Detail: detail, Remedy: remedy}
}
