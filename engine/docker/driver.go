// This file is the driver: what it is made of, and how a request of dockerd's finds its function.

package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// SocketName is the socket's in the runtime directory.
const SocketName = "docker.sock"

// API is what the driver asks of the daemon: an *api.Client, or a fake.
type API interface {
	Status(ctx context.Context) (api.Status, error)
	Attach(ctx context.Context, r api.AttachRequest) (api.Attachment, error)
	DetachSoon(ctx context.Context, ref, owner string) error
	Attachments(ctx context.Context) ([]api.Attachment, error)
	AttachmentsOf(ctx context.Context, owner string) ([]api.Attachment, error)
	Rename(ctx context.Context, ref string, r api.NamesRequest) (api.Attachment, error)
	Publish(ctx context.Context, ref string, r api.PublishRequest) ([]api.Port, error)
	Unpublish(ctx context.Context, ref string, r api.UnpublishRequest) ([]api.Port, error)
	ReserveAddress(ctx context.Context, r api.AddressRequest) (api.Address, error)
	ReleaseAddress(ctx context.Context, addr string) error
	Addresses(ctx context.Context) ([]api.Address, error)
}

// Config is what a Driver is told.
type Config struct {
	API API
	// StateDir and RuntimeDir are the daemon's, and exist.
	StateDir, RuntimeDir string
	// DockerHost is the path of the socket where dockerd is looked for before it has called; "" for none.
	DockerHost string
	// Look is Look, for a daemon that may not look into dockerd itself; nil is Look.
	Look func(pid int) Dockerd
	Log  *slog.Logger
}

// Driver answers dockerd. Make it with New.
type Driver struct {
	api      API
	log      *slog.Logger
	peek     func(pid int) Dockerd
	networks *networks
	sockets  *sockets

	// readyPatience is how long a request waits for a daemon that has no subnet yet.
	readyPatience time.Duration
	// settle is how long something may look forgotten by dockerd before it is believed to be: an endpoint is listed only when its container
	// has been started.
	settle time.Duration
	// connectPatience is the constant but for tests.
	connectPatience time.Duration

	following atomic.Pointer[following] // while Follow runs

	mu      sync.Mutex
	refused map[string]string // why an endpoint has not all of its names, by its id
	given   map[string]gift   // addresses that dockerd was given just now
}

// New makes a Driver and reads its files. It starts nothing.
func New(c Config) *Driver {
	d := &Driver{
		api:           c.API,
		log:           c.Log,
		peek:          c.Look,
		readyPatience: 20 * time.Second,
		settle:        15 * time.Second,
		refused:       make(map[string]string),
		given:         make(map[string]gift),

		connectPatience: connectPatience,
	}
	if d.peek == nil {
		d.peek = Look
	}
	var err error
	if d.networks, err = openNetworks(c.StateDir); err != nil {
		d.log.Warn("a file of docker's driver cannot be read; what it named is not known until docker asks again", "err", err)
	}
	if d.sockets, err = openSockets(c.RuntimeDir, c.DockerHost); err != nil {
		d.log.Warn("a file of docker's driver cannot be read; what it named is not known until docker asks again", "err", err)
	}
	return d
}

// call answers one request; pid is dockerd's, 0 if it cannot be seen.
type call func(ctx context.Context, w http.ResponseWriter, r *http.Request, pid int)

// Handler is the plugin protocol. It trusts whoever reaches it: put it behind api.ListenBeside.
func (d *Driver) Handler() http.Handler {
	calls := map[string]call{
		"/Plugin.Activate":                           answer(func() any { return activation{[]string{"NetworkDriver", "IpamDriver"}} }),
		"/NetworkDriver.GetCapabilities":             answer(func() any { return capabilities{Scope: scopeLocal, ConnectivityScope: "global"} }),
		"/NetworkDriver.CreateNetwork":               serve(checked(d.createNetwork)),
		"/NetworkDriver.DeleteNetwork":               serve(checked(d.deleteNetwork)),
		"/NetworkDriver.AllocateNetwork":             refuse("swarm's networks are not supported: create the network on every host, without --scope swarm"),
		"/NetworkDriver.FreeNetwork":                 answer(func() any { return nothing{} }),
		"/NetworkDriver.CreateEndpoint":              serve(checked(d.createEndpoint)),
		"/NetworkDriver.DeleteEndpoint":              serve(checked(d.deleteEndpoint)),
		"/NetworkDriver.EndpointOperInfo":            serve(checked(d.endpointInfo)),
		"/NetworkDriver.Join":                        serve(checked(d.join)),
		"/NetworkDriver.Leave":                       serve(checked(d.leave)),
		"/NetworkDriver.ProgramExternalConnectivity": serve(checked(d.publish)),
		"/NetworkDriver.RevokeExternalConnectivity":  serve(checked(d.unpublish)),
		"/NetworkDriver.DiscoverNew":                 answer(func() any { return nothing{} }),
		"/NetworkDriver.DiscoverDelete":              answer(func() any { return nothing{} }),
		"/IpamDriver.GetCapabilities":                answer(func() any { return ipamCapabilities{} }),
		"/IpamDriver.GetDefaultAddressSpaces":        answer(func() any { return addressSpaces{addressSpaceLocal, addressSpaceGlobal} }),
		"/IpamDriver.RequestPool":                    serve(d.requestPool),
		"/IpamDriver.ReleasePool":                    answer(func() any { return nothing{} }),
		"/IpamDriver.RequestAddress":                 serve(d.requestAddress),
		"/IpamDriver.ReleaseAddress":                 serve(d.releaseAddress),
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		do, known := calls[r.URL.Path]
		switch {
		case !known:
			reply(w, http.StatusNotFound, failed("rootless-ovl: this driver has no "+clip(r.URL.Path)))
		case r.Method != http.MethodPost:
			w.Header().Set("Allow", http.MethodPost)
			reply(w, http.StatusMethodNotAllowed, failed("rootless-ovl: docker's plugin protocol uses POST"))
		default:
			pid, err := api.CallerPID(r.Context())
			if err != nil {
				d.log.Debug("dockerd cannot be seen", "err", err)
			}
			d.seen(pid)
			do(r.Context(), w, r, pid)
		}
	})
}

// pidKey is a request's context key for dockerd's pid.
type pidKey struct{}

// serve decodes a request, has it answered by f, and sends the answer, or the error as docker shows it to its user.
func serve[R any](f func(context.Context, *R) (any, error)) call {
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request, pid int) {
		req := new(R)
		if err := decode(r.Body, req); err != nil {
			reply(w, http.StatusBadRequest, failed("rootless-ovl: "+err.Error()))
			return
		}
		v, err := f(context.WithValue(ctx, pidKey{}, pid), req)
		if err != nil {
			v = failed(failureText(err))
		}
		reply(w, http.StatusOK, v)
	}
}

// checked has f called with requests whose ids can be.
func checked[R any, P interface {
	*R
	check() error
}](f func(context.Context, P) (any, error)) func(context.Context, *R) (any, error) {
	return func(ctx context.Context, r *R) (any, error) {
		if err := P(r).check(); err != nil {
			return nil, err
		}
		return f(ctx, r)
	}
}

// answer is for what needs no request.
func answer(f func() any) call {
	return func(_ context.Context, w http.ResponseWriter, _ *http.Request, _ int) { reply(w, http.StatusOK, f()) }
}

func refuse(text string) call { return answer(func() any { return failed("rootless-ovl: " + text) }) }

// failureText is one line: docker puts it behind its own words.
func failureText(err error) string {
	return "rootless-ovl: " + strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

func reply(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		body, _ = json.Marshal(failed("rootless-ovl: the answer is not JSON: " + err.Error())) // a string always marshals
	}
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a dockerd that has gone cannot be told
}

// ready is the node's status once it has a subnet. It waits for one for a while: hosts start dockerd and the daemon together.
func (d *Driver) ready(ctx context.Context) (api.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, d.readyPatience)
	defer cancel()
	for {
		s, err := d.api.Status(ctx)
		switch {
		case err != nil:
			return s, err
		case s.State == api.StateReady || s.State == api.StateLeaseLost:
			return s, nil
		case s.State == api.StateStopping:
			return s, errors.New("the daemon is stopping: start it again with `rootless-ovl up`")
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return s, fmt.Errorf("the node has no subnet yet (%s): see `rootless-ovl status`, then start the container again", s.State)
		}
	}
}

// clip shortens what somebody sent so that it fits in an error line.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}
