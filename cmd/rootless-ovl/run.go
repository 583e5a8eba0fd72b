// rootless-ovl run: a command in a namespace of its own, on the overlay.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// detachPatience bounds what run waits for the daemon after its command has ended.
const detachPatience = 5 * time.Second

// sandbox is a *nsutil.Sandbox, or a fake.
type sandbox interface {
	PID() int
	Release() error
	Warnings() []string
	ForwardSignals() (stop func())
	Done() <-chan struct{}
	Wait() (int, error)
	Close() error
}

func (a *app) runCommand() *cobra.Command {
	var req api.AttachRequest
	var root bool
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG...]",
		Short: "Run a command with the overlay as its network",
		Long: `Run a command in a new user, network and mount namespace whose network is the overlay. Files are the host's, but
/etc/resolv.conf names the gateway. Signals are passed on to the command, and its exit status is that of run: 127 where
it is not found, 126 where it cannot be executed, 128 + n where signal n ended it. When it has ended, what it left running is
killed.

With --output json the attachment is printed on standard error before the command starts.`,
		Example: `  rootless-ovl run -- curl http://10.213.7.20
  rootless-ovl run --name job7 -- go test ./...
  rootless-ovl run -p 8080:8000 -- python3 -m http.server
  rootless-ovl run --root -- sh -c 'ip addr'`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 || args[0] == "" {
				return usagef("run needs a command: give it after --, as `rootless-ovl run -- curl http://10.213.7.20`")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			a.ownStdout = true    // it is the command's
			req.PID = os.Getpid() // until there is the sandbox's
			if err := req.Validate(); err != nil {
				return usageError{err}
			}
			return a.runIn(cmd.Context(), req, nsutil.Spec{Args: args, MapRoot: root})
		},
	}
	fs := cmd.Flags()
	fs.SetInterspersed(false) // what follows the command's name is the command's
	attachFlags(fs, &req)
	fs.BoolVar(&root, "root", false, "be root (uid 0) in the new namespace instead of yourself")
	return cmd
}

// runIn runs the command on the overlay. A signal that comes before there is a command to pass it to ends run as it would
// have ended the command.
func (a *app) runIn(ctx context.Context, req api.AttachRequest, spec nsutil.Spec) error {
	return statusOfSignal(catchSignals(ctx), func(early *signalContext) error { return a.runUntil(early, req, spec) })
}

// statusOfSignal is what run returns, or 128 + n if signal n came before there was a command to pass it to.
func statusOfSignal(early *signalContext, run func(*signalContext) error) error {
	err := run(early)
	if sig := early.stop(); sig != 0 && err != nil {
		return exitStatus(128 + int(sig))
	}
	return err
}

// runUntil attaches a new sandbox, lets the command in it go, and takes it off the overlay when it has ended. Signals are
// caught by early until there is the command.
func (a *app) runUntil(early *signalContext, req api.AttachRequest, spec nsutil.Spec) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	defer c.Close()
	status, err := c.Status(early)
	if err != nil {
		return err
	}
	if status.State == api.StateStarting { // the node holds back all but the question for its status until it has started
		if _, err = c.Attachments(early); err == nil {
			status, err = c.Status(early)
		}
		if err != nil {
			return err
		}
	}
	if status.Gateway == "" {
		return api.Errorf(api.CodeUnavailable, "the node has no subnet yet (%s): `rootless-ovl status` says more", status.State)
	}
	spec.ResolvConf = api.DNS{Server: status.Gateway, Search: []string{status.Domain}}.ResolvConf(a.hostResolvConf())

	sb, err := a.startSandbox(spec)
	if err != nil {
		return err
	}
	defer sb.Close()
	req.PID = sb.PID()
	att, err := c.Attach(early, req)
	if err != nil {
		return runError(err, req)
	}
	a.warn(att.Warnings)
	detach := sync.OnceFunc(func() { a.detachAfterRun(early.parent, c, sb.PID()) })
	defer detach()
	if a.output.value == outputJSON {
		if err := json.NewEncoder(a.stderr).Encode(att); err != nil {
			return err
		}
	}
	return a.play(early, sb, detach)
}

// runError names an attach that failed by what the user knows of it: nobody has seen the sandbox's pid.
func runError(err error, req api.AttachRequest) error {
	var e *api.Error
	if !errors.As(err, &e) {
		return err
	}
	what := "run"
	if req.Name != "" {
		what += " " + req.Name
	}
	if rest, ok := strings.CutPrefix(e.Message, fmt.Sprintf("attach pid %d:", req.PID)); ok {
		return &api.Error{Message: what + ":" + rest, Code: e.Code}
	}
	return err
}

// play lets the command of a sandbox go and returns with its exit status. ended is called when it has ended, while its pid is surely its own.
func (a *app) play(early *signalContext, sb sandbox, ended func()) error {
	stop := sb.ForwardSignals()
	defer stop()
	if early.stop() != 0 || early.Err() != nil {
		return context.Cause(early)
	}
	err := sb.Release()
	warned := a.warn(sb.Warnings())
	var cannot *nsutil.CommandError
	if errors.As(err, &cannot) {
		a.report(cannot, codeOf(cannot))
		return exitStatus(cannot.Code)
	}
	if err != nil {
		return err
	}
	<-sb.Done()
	a.warn(sb.Warnings()[warned:])
	ended()
	code, err := sb.Wait()
	if err != nil {
		return err
	}
	if code != 0 {
		return exitStatus(code)
	}
	return nil
}

// warn says what is not as it should be, and how many such things there were.
func (a *app) warn(warnings []string) int {
	for _, w := range warnings {
		fmt.Fprintln(a.stderr, "rootless-ovl: warning:", w)
	}
	return len(warnings)
}

// detachAfterRun frees the address at once; the daemon would notice the end of the command by itself a little later, and may
// have done so already. The attachment is named by its pid, not yet reaped: by now another run may have its name.
func (a *app) detachAfterRun(ctx context.Context, c *api.Client, pid int) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachPatience)
	defer cancel()
	if err := c.Detach(ctx, strconv.Itoa(pid), ""); err != nil && !errors.Is(err, api.ErrNotFound) {
		fmt.Fprintln(a.stderr, "rootless-ovl: warning: the command has ended and could not be detached:", err)
	}
}

// signalContext is a context that INT, TERM and HUP end until stop, except those that were ignored when we started.
type signalContext struct {
	context.Context
	parent context.Context
	stop   func() syscall.Signal // no signal is caught any more; which one ended the context, or 0
}

func catchSignals(parent context.Context) *signalContext {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 1)
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(sig) {
			signal.Notify(ch, sig)
		}
	}
	quit, gone := make(chan struct{}), make(chan struct{})
	var caught syscall.Signal
	take := func(sig os.Signal) {
		caught, _ = sig.(syscall.Signal)
		cancel(fmt.Errorf("%v", sig))
	}
	go func() {
		defer close(gone)
		select {
		case sig := <-ch:
			take(sig)
		case <-quit:
		}
	}()
	return &signalContext{ctx, parent, sync.OnceValue(func() syscall.Signal {
		signal.Stop(ch)
		close(quit)
		<-gone
		select {
		case sig := <-ch: // it came as we stopped
			if caught == 0 {
				take(sig)
			}
		default:
		}
		return caught
	})}
}

// readResolvConf is the host's resolver configuration, empty where there is none.
func readResolvConf() string {
	f, err := os.Open("/etc/resolv.conf")
	if err != nil {
		return "" // without one there is nothing to take over
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10)) // what could be read is better than nothing
	return string(b)
}
