// The daemon's side: a Backend behind HTTP, with every request decoded strictly.

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// MaxBody is the most bytes a request's body may have. The largest is an attach with MaxPorts published ports that are no ranges, as a CNI runtime
// lists them: with an IPv6 address each that is 250 KB.
const MaxBody = 512 << 10

// Backend is what the API stands in front of. Its methods are called from many goroutines at once. Their errors are sent with
// the code of the Error or sentinel they wrap, otherwise as CodeInternal; the text should name the thing and the remedy.
type Backend interface {
	Status(ctx context.Context) (Status, error)
	// Attach gets a request that has passed Validate; whose the descriptor in it is, CallerPID tells. When ctx ends before it is done it leaves
	// nothing behind.
	Attach(ctx context.Context, r AttachRequest) (Attachment, error)
	// Detach takes a name, or a pid in decimal, and whose it must be, "" for anybody's: another owner's is CodeNotFound.
	Detach(ctx context.Context, nameOrPID, owner string) error
	// DetachSoon returns when packets do not flow any more; the rest of Detach follows by itself.
	DetachSoon(ctx context.Context, nameOrPID, owner string) error
	Attachments(ctx context.Context) ([]Attachment, error)
	// Rename gets a name, or a pid in decimal, and a valid request.
	Rename(ctx context.Context, nameOrPID string, r NamesRequest) (Attachment, error)
	// Publish and Unpublish get a name, or a pid in decimal, and a valid request. Both do all of it or nothing.
	Publish(ctx context.Context, nameOrPID string, r PublishRequest) ([]Port, error)
	Unpublish(ctx context.Context, nameOrPID string, r UnpublishRequest) ([]Port, error)
	// ReserveAddress gets a valid request, ReleaseAddress an IPv4 address.
	ReserveAddress(ctx context.Context, r AddressRequest) (Address, error)
	ReleaseAddress(ctx context.Context, addr string) error
	Addresses(ctx context.Context) ([]Address, error)
	Peers(ctx context.Context) ([]Peer, error)
	// Config gives the network config as it stands in the store: JSON.
	Config(ctx context.Context) (json.RawMessage, error)
	// SetConfig gets well-formed JSON and is responsible for all further validation.
	SetConfig(ctx context.Context, raw json.RawMessage) error
	// Forward opens a connection to a name or address of the overlay, calls accept for the client's end, copies between the two, and
	// returns when both directions are done or ctx ends. An error says why there is no connection. accept, which fails if the client has
	// gone, is called at most once.
	Forward(ctx context.Context, to string, accept func() (*Stream, error)) error
}

// Handler serves the API from b. It trusts whoever reaches it: put it behind Listen.
func Handler(b Backend) http.Handler {
	mux := http.NewServeMux()
	methods(mux, PathStatus, map[string]action{
		http.MethodGet: func(r *http.Request) (any, error) { return b.Status(r.Context()) },
	})
	methods(mux, PathAttachments, map[string]action{
		http.MethodGet: func(r *http.Request) (any, error) {
			list, err := b.Attachments(r.Context())
			if query := r.URL.Query(); err == nil && query.Has("owner") {
				list, err = ownedBy(list, query.Get("owner"))
			}
			return orEmpty(list), err
		},
		http.MethodPost: func(r *http.Request) (any, error) {
			req, err := decodeAttach(r.Body)
			if err != nil {
				return nil, err
			}
			if err := checkPIDs(r.Context(), req.PID != 0 || strings.HasPrefix(path.Clean(req.Netns), "/proc/")); err != nil {
				return nil, err
			}
			return b.Attach(r.Context(), req)
		},
	})
	methods(mux, PathAttachments+"/{ref}", map[string]action{
		http.MethodDelete: func(r *http.Request) (any, error) {
			ref, err := refOf(r)
			if err != nil {
				return nil, err
			}
			query := r.URL.Query()
			owner := query.Get("owner")
			if query.Has("owner") {
				if err := CheckOwner(owner); err != nil {
					return nil, err
				}
			}
			switch wait := query.Get("wait"); wait {
			case "", "true":
				return nil, b.Detach(r.Context(), ref, owner)
			case "false":
				return nil, b.DetachSoon(r.Context(), ref, owner)
			default:
				return nil, Errorf(CodeInvalid, "wait=%s: it is true or false", clip(wait))
			}
		},
	})
	methods(mux, PathAttachments+"/{ref}/names", map[string]action{
		http.MethodPut: func(r *http.Request) (any, error) {
			ref, err := refOf(r)
			if err != nil {
				return nil, err
			}
			var req NamesRequest
			if err := decodeStrict(r.Body, &req, "a names request"); err != nil {
				return nil, err
			}
			if err := req.Validate(); err != nil {
				return nil, err
			}
			return b.Rename(r.Context(), ref, req)
		},
	})
	methods(mux, PathAttachments+"/{ref}/ports", portActions(b))
	methods(mux, PathAddresses, addressesActions(b))
	methods(mux, PathAddresses+"/{addr}", addressActions(b))
	methods(mux, PathPeers, map[string]action{
		http.MethodGet: func(r *http.Request) (any, error) {
			list, err := b.Peers(r.Context())
			return orEmpty(list), err
		},
	})
	methods(mux, PathConfig, map[string]action{
		http.MethodGet: func(r *http.Request) (any, error) { return b.Config(r.Context()) },
		http.MethodPut: func(r *http.Request) (any, error) {
			raw, err := decodeConfig(r.Body)
			if err != nil {
				return nil, err
			}
			return nil, b.SetConfig(r.Context(), raw)
		},
	})
	mux.HandleFunc(PathDial, dialing(b))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, Errorf(CodeNotFound, "the daemon has no %q: is the client newer than the daemon?", clip(r.URL.Path)))
	})
	return mux
}

// Serve answers on ln from h until ctx ends, then lets running requests finish for at most five seconds, closes ln and returns
// nil. Streams end with ctx at once. It returns an error only when ln fails before that.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	streams, endStreams := context.WithCancel(ctx)
	all := &serving{ctx: streams}
	defer all.streams.Wait()
	defer endStreams()
	srv := &http.Server{
		Handler:           h,
		BaseContext:       func(net.Listener) context.Context { return context.WithValue(context.Background(), servingKey{}, all) },
		ConnContext:       withPeer,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if srv.Shutdown(last) != nil {
			_ = srv.Close() // ends the requests that did not finish in time; nothing is left to report to
		}
	})
	err := srv.Serve(ln)
	if stop() {
		return err // ctx has not ended: the listener failed
	}
	<-done
	return nil
}

// action answers one request: a value to send as JSON (nil: no content), or an error.
type action func(r *http.Request) (any, error)

// methods routes pattern to one action per method and refuses other methods.
func methods(mux *http.ServeMux, pattern string, by map[string]action) {
	var allow []string
	for _, m := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
		if by[m] != nil {
			allow = append(allow, m)
		}
	}
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		act := by[r.Method]
		if act == nil {
			w.Header().Set("Allow", strings.Join(allow, ", "))
			e := Errorf(CodeInvalid, "%s is not done to %s: use %s", clip(r.Method), pattern, strings.Join(allow, " or "))
			writeJSON(w, http.StatusMethodNotAllowed, e)
			return
		}
		v, err := act(r)
		switch {
		case err != nil:
			writeError(w, err)
		case v == nil:
			w.WriteHeader(http.StatusNoContent)
		default:
			writeJSON(w, http.StatusOK, v)
		}
	})
}

// headerAgain is in an answer to a request that was not begun, with 503 and CodeUnavailable: sent once more, it gets to the process that has taken
// the place of this one. Its value is a time in seconds (RFC 9110, 10.2.3).
const headerAgain = "Retry-After"

// WriteReplaced answers a request that this process will not begin, as another has taken its place. Client sends it again by itself.
func WriteReplaced(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, MaxBody)) // who cannot send all of it may not see the answer
	w.Header().Set("Connection", "close")
	w.Header().Set(headerAgain, "0")
	writeError(w, Errorf(CodeUnavailable, "the daemon was just replaced, and has not begun with this: send it again"))
}

// ReadAhead reads the body of a request that has to wait, and has it be read from memory then. It says no when it has answered the request.
func ReadAhead(w http.ResponseWriter, r *http.Request) bool {
	b, err := readBody(r.Body)
	if err != nil {
		writeError(w, err)
		return false
	}
	r.Body = io.NopCloser(bytes.NewReader(b))
	return true
}

func writeError(w http.ResponseWriter, err error) {
	e := asError(err)
	writeJSON(w, e.status(), e)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		status = http.StatusInternalServerError
		body, _ = json.Marshal(Errorf(CodeInternal, "the daemon's answer is not JSON: %v", err)) // two strings always marshal
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a client that has gone cannot be told
}

// ownedBy are those of list that have the owner: one, or none.
func ownedBy(list []Attachment, owner string) ([]Attachment, error) {
	if err := CheckOwner(owner); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(list), func(a Attachment) bool { return a.Owner != owner }), nil
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{} // "[]" and not "null"
	}
	return list
}

// CheckRef tells whether ref can name an attachment: a name, or a pid in decimal without a sign. Errors have CodeInvalid.
func CheckRef(ref string) error {
	if !isPID(ref) && CheckName(ref) != nil {
		return Errorf(CodeInvalid, "%q is neither a name nor a pid of an attachment: see the list of attachments", clip(ref))
	}
	return nil
}

// refOf is the attachment that a request's path names.
func refOf(r *http.Request) (string, error) {
	ref := r.PathValue("ref")
	if err := CheckRef(ref); err != nil {
		return "", err
	}
	return ref, checkPIDs(r.Context(), isPID(ref))
}

// isPID tells whether a reference is a pid and not a name.
func isPID(ref string) bool {
	_, err := strconv.ParseUint(ref, 10, 31) // which takes no sign
	return err == nil
}

// readBody reads all of a body of at most MaxBody bytes.
func readBody(body io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(body, MaxBody+1))
	if err != nil {
		return nil, Errorf(CodeInvalid, "the request's body ends early: %v", err)
	}
	if len(b) > MaxBody {
		return nil, Errorf(CodeInvalid, "the request's body is larger than %d bytes", MaxBody)
	}
	return b, nil
}

// decodeAttach reads an AttachRequest strictly and validates it.
func decodeAttach(body io.Reader) (AttachRequest, error) {
	var req AttachRequest
	if err := decodeStrict(body, &req, "an attach request"); err != nil {
		return req, err
	}
	return req, req.Validate()
}

// decodeStrict reads a body that must be one JSON object with no members but v's; what says what v is.
func decodeStrict(body io.Reader, v any, what string) error {
	b, err := readBody(body)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		var te *json.UnmarshalTypeError
		if errors.As(err, &te) && te.Field != "" {
			return Errorf(CodeInvalid, "the request is not %s: %s cannot be the %s", what, te.Field, clip(te.Value))
		}
		return Errorf(CodeInvalid, "the request is not %s: %s", what, clip(err.Error()))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Errorf(CodeInvalid, "the request has something after its JSON object")
	}
	return nil
}

// decodeConfig reads a body that must be one JSON object; what it means is the Backend's to judge.
func decodeConfig(body io.Reader) (json.RawMessage, error) {
	b, err := readBody(body)
	if err != nil {
		return nil, err
	}
	b = bytes.TrimSpace(b)
	if !json.Valid(b) || len(b) == 0 || b[0] != '{' {
		return nil, Errorf(CodeInvalid, "the network config is not a JSON object: see `rootless-ovl config set --help`")
	}
	return b, nil
}
