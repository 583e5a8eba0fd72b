// The plugin's four calls, and how their outcome is told.

package netavark

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// apiVersion is the version of the plugin protocol.
const apiVersion = "1.0.0"

// patience bounds what a call waits for the daemon: podman holds a lock meanwhile.
const patience = 45 * time.Second

// API is what the plugin asks of the daemon: an *api.Client, or a fake in a test.
type API interface {
	Status(ctx context.Context) (api.Status, error)
	Attach(ctx context.Context, r api.AttachRequest) (api.Attachment, error)
	Detach(ctx context.Context, nameOrPID, owner string) error
	AttachmentsOf(ctx context.Context, owner string) ([]api.Attachment, error)
}

// Plugin answers one call of podman or netavark.
type Plugin struct {
	Connect func() (API, error) // called once, by calls that need the daemon
	Version string              // of this program
	Getenv  func(string) string
	Stdin   io.Reader
	Stdout  io.Writer // the protocol's
	Stderr  io.Writer // shown to podman's user
}

// Run does what args say: create, setup NETNS, teardown NETNS, or info, which is also meant by none. It reports whether that succeeded; if not,
// the error stands on Stdout, where netavark looks for it.
func (p *Plugin) Run(ctx context.Context, args []string) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := p.call(ctx, args); err != nil {
		_ = p.answer(struct {
			Error string `json:"error"`
		}{err.Error()}) // when this fails, too, there is nobody to tell
		return false
	}
	return true
}

func (p *Plugin) call(ctx context.Context, args []string) error {
	if len(args) == 0 {
		args = []string{"info"}
	}
	switch what := args[0]; what {
	case "create":
		return p.create(ctx)
	case "setup":
		if len(args) < 2 || args[1] == "" {
			return errors.New("setup needs the path of a network namespace: `setup PATH`")
		}
		return p.setup(ctx, args[1])
	case "teardown":
		return p.teardown(ctx)
	case "info":
		return p.answer(struct {
			Version string `json:"version"`
			API     string `json:"api_version"`
		}{p.Version, apiVersion})
	default:
		return fmt.Errorf("%q is no call of netavark's plugin protocol: there are create, setup, teardown and info", what)
	}
}

// answer writes v in one piece.
func (p *Plugin) answer(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	if _, err := b.WriteTo(p.Stdout); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}

// warn tells podman's user something that is no error.
func (p *Plugin) warn(format string, args ...any) {
	fmt.Fprintf(p.Stderr, "rootless-ovl: warning: "+format+"\n", args...)
}
