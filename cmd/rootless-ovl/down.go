// rootless-ovl down: stop the daemon, and wait until it has ended.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// How long the daemon may take to answer, and to end: a store that is away is given up before that.
const (
	downAnswer = 10 * time.Second
	downLimit  = 30 * time.Second
)

func (a *app) downCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Stop this host's node, and wait until it has ended",
		Long: `Stop the daemon that "up" runs, as SIGTERM does, and wait until it has ended: an ephemeral node has given back its subnet then.
Where no daemon runs there is nothing to do.`,
		Example: `  rootless-ovl down`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), downAnswer)
			defer cancel()
			s, err := c.Status(ctx)
			if errors.Is(err, api.ErrNotRunning) {
				return a.print(map[string]int{}, func(w io.Writer) { fmt.Fprintln(w, "no daemon is running") })
			}
			if err != nil {
				return err
			}
			if err := a.endDaemon(cmd.Context(), s.PID); err != nil {
				return err
			}
			return a.print(map[string]int{"pid": s.PID}, func(w io.Writer) { fmt.Fprintln(w, "stopped, pid", s.PID) })
		},
	}
}

// endDaemon sends SIGTERM to a daemon and waits for its end. The pid is what the daemon takes for its own, which in another PID
// namespace is somebody else's here: only a process of this program's name is sent anything.
func endDaemon(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return api.Errorf(api.CodeNotFound, "the daemon says that it is pid %d, which is not here: run `rootless-ovl down` in its PID namespace", pid)
	}
	if err != nil {
		return fmt.Errorf("pid %d of the daemon: %w", pid, err)
	}
	defer unix.Close(fd)
	theirs, own := commOf(pid), commOf(os.Getpid())
	if theirs != own {
		return api.Errorf(api.CodeInvalid, "the daemon says that it is pid %d, which here is %q and not %q: run `rootless-ovl down` in its PID namespace", pid, theirs, own)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop pid %d: %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, downLimit)
	defer cancel()
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for pid %d: %w", pid, err)
		}
	}
	return api.Errorf(api.CodeUnavailable, "the daemon (pid %d) still runs %v after SIGTERM: its log says why; `kill -KILL %d` ends it without giving anything back", pid, downLimit, pid)
}

// commOf is a process's name as the kernel has it, empty where there is no process.
func commOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "" // gone, or hidden
	}
	return strings.TrimSpace(string(b))
}
