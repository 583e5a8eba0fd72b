// The entry point, and what ties the commands to the real world.

package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/engine/dockerlink"
	"github.com/rootless-ovl/rootless-ovl/internal/doctor"
	"github.com/rootless-ovl/rootless-ovl/internal/opener"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/node"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// world is what the commands touch outside this program; tests have another.
type world struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	now            func() time.Time
	hostResolvConf func() string

	newNode      func(node.Config) (nodeRunner, error)
	openStore    func(context.Context, lease.ClientConfig, string) (configStore, error)
	startSandbox func(nsutil.Spec) (sandbox, error)
	joinSandbox  func(api.Attachment, nsutil.Spec) (sandbox, error) // in its namespaces
	diagnose     func(context.Context, doctor.Options) []doctor.Check

	programPath   func() string
	pluginPath    func() string // of the engines' program; empty: there is none
	podmanVersion func(context.Context) string
	onPath        func(program string) bool
	systemdRuns   func() bool
	// dockerLink keeps the docker plugin's socket where dockerd finds it, until the context ends.
	dockerLink func(ctx context.Context, put func() (pid int, made bool, err error), log *slog.Logger)
	shutIn     func(shutInOrder) (sight, error)
	endDaemon  func(ctx context.Context, pid int) error // until it has ended
}

func main() {
	nsutil.MaybeChild() // in a sandbox of `run` this does not return
	opener.MaybeServe() // nor does this in the daemon's second process
	os.Exit(execute(context.Background(), realWorld(), os.Args[1:]))
}

func realWorld() world {
	return world{
		stdin:          os.Stdin,
		stdout:         os.Stdout,
		stderr:         os.Stderr,
		now:            time.Now,
		hostResolvConf: readResolvConf,
		newNode:        func(c node.Config) (nodeRunner, error) { return node.New(c) },
		openStore:      openEtcd,
		startSandbox:   func(s nsutil.Spec) (sandbox, error) { return nsutil.Start(s) },
		joinSandbox:    joinSandbox,
		diagnose:       doctor.Run,
		programPath:    ownPath,
		pluginPath:     pluginPath,
		podmanVersion:  askPodman,
		onPath:         onSearchPath,
		systemdRuns:    underSystemd,
		dockerLink:     dockerlink.Keep,
		shutIn:         shutIn,
		endDaemon:      endDaemon,
	}
}

// untilSignal is ctx until SIGINT or SIGTERM; a second one ends the program at once, as if nobody listened.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
