// The client's side, for the command line and the engine clients.

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"
)

// MaxAnswer is the most bytes a Client reads of an answer; some ten thousand peers need 4 MB.
const MaxAnswer = 32 << 20

// Client speaks to the daemon on one socket. It is safe for many goroutines.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient makes a Client for the socket at that path (see SocketPath). It connects with the first request.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{
		socket: socket,
		// A connection that is kept may be closed by a daemon that is being replaced, just when the next request is on its way: nobody could say
		// whether that was begun.
		http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true, DisableKeepAlives: true}},
	}
}

// Close gives up idle connections. The Client may still be used.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks how the node is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.do(ctx, http.MethodGet, PathStatus, nil, &s)
	return s, err
}

// Attach puts a namespace on the overlay.
func (c *Client) Attach(ctx context.Context, r AttachRequest) (Attachment, error) {
	var a Attachment
	if err := r.Validate(); err != nil {
		return a, err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return a, fmt.Errorf("attach request: %w", err)
	}
	err = c.do(ctx, http.MethodPost, PathAttachments, body, &a)
	return a, err
}

// Detach takes the attachment with that name, or pid in decimal, off the overlay. It must be owner's unless that is empty, else the error is
// ErrNotFound: between a list and a detach a name may have become another's.
func (c *Client) Detach(ctx context.Context, nameOrPID, owner string) error {
	return c.detach(ctx, nameOrPID, owner, url.Values{})
}

// DetachSoon is Detach for a container that has ended: it does not wait until the kernel has removed its interface. A later Attach that wants its
// name or address waits for that.
func (c *Client) DetachSoon(ctx context.Context, nameOrPID, owner string) error {
	return c.detach(ctx, nameOrPID, owner, url.Values{"wait": {"false"}})
}

func (c *Client) detach(ctx context.Context, nameOrPID, owner string, query url.Values) error {
	if err := CheckRef(nameOrPID); err != nil {
		return err
	}
	if owner != "" {
		query.Set("owner", owner)
	}
	path := PathAttachments + "/" + url.PathEscape(nameOrPID)
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return c.do(ctx, http.MethodDelete, path, nil, nil)
}

// Attachments lists what is attached.
func (c *Client) Attachments(ctx context.Context) ([]Attachment, error) {
	var list []Attachment
	err := c.do(ctx, http.MethodGet, PathAttachments, nil, &list)
	return list, err
}

// AttachmentsOf lists what has that owner: one attachment, or none.
func (c *Client) AttachmentsOf(ctx context.Context, owner string) ([]Attachment, error) {
	if err := CheckOwner(owner); err != nil {
		return nil, err
	}
	var list []Attachment
	err := c.do(ctx, http.MethodGet, PathAttachments+"?owner="+url.QueryEscape(owner), nil, &list)
	return list, err
}

// Rename gives the attachment with that name, or pid in decimal, other names.
func (c *Client) Rename(ctx context.Context, nameOrPID string, r NamesRequest) (Attachment, error) {
	var a Attachment
	if err := CheckRef(nameOrPID); err != nil {
		return a, err
	}
	if err := r.Validate(); err != nil {
		return a, err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return a, fmt.Errorf("names request: %w", err)
	}
	err = c.do(ctx, http.MethodPut, PathAttachments+"/"+url.PathEscape(nameOrPID)+"/names", body, &a)
	return a, err
}

// Peers lists the other nodes.
func (c *Client) Peers(ctx context.Context) ([]Peer, error) {
	var list []Peer
	err := c.do(ctx, http.MethodGet, PathPeers, nil, &list)
	return list, err
}

// Config reads the network config from the store, through the daemon.
func (c *Client) Config(ctx context.Context) (json.RawMessage, error) {
	var raw json.RawMessage
	err := c.do(ctx, http.MethodGet, PathConfig, nil, &raw)
	return raw, err
}

// SetConfig writes the network config to the store, through the daemon, which validates it.
func (c *Client) SetConfig(ctx context.Context, raw json.RawMessage) error {
	return c.do(ctx, http.MethodPut, PathConfig, raw, nil)
}

// do sends one request and decodes the answer into v (nil: the answer has no body). An *Error of the daemon comes back as one.
func (c *Client) do(ctx context.Context, method, path string, body []byte, v any) error {
	b, err := again(ctx, func() ([]byte, error) { return c.ask(ctx, method, path, body) })
	if err != nil || v == nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return Errorf(CodeInternal, "%s answered %s %s with something else than expected (%v): is it a rootless-ovl daemon of this version?",
			c.socket, method, path, err)
	}
	return nil
}

// ask is one request and its answer.
func (c *Client) ask(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	if err := c.checkSocket(); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://rootless-ovl"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, MaxAnswer+1))
	if err != nil {
		return nil, c.transportError(ctx, err)
	}
	if len(b) > MaxAnswer {
		return nil, Errorf(CodeInternal, "the daemon's answer to %s %s is larger than %d bytes", method, path, MaxAnswer)
	}
	if resp.StatusCode >= http.StatusMultipleChoices {
		return nil, c.refusal(method, path, resp, b)
	}
	return b, nil
}

const (
	// replacedPatience is how long requests are sent again that a daemon has not begun as it was replaced. Until the other listens alone, which takes
	// a moment, such a daemon may get them more than once.
	replacedPatience = 15 * time.Second
	replacedPause    = 20 * time.Millisecond
)

// notBegunError is why a request may be sent again.
type notBegunError struct{ error }

func (e *notBegunError) Unwrap() error { return e.error }

// again calls send until the daemon has begun with it, or replacedPatience is over.
func again[T any](ctx context.Context, send func() (T, error)) (T, error) {
	for end := time.Now().Add(replacedPatience); ; {
		v, err := send()
		var notBegun *notBegunError
		if !errors.As(err, &notBegun) {
			return v, err
		}
		if time.Now().After(end) {
			return v, notBegun.error
		}
		select {
		case <-time.After(replacedPause):
		case <-ctx.Done():
			return v, notBegun.error
		}
	}
}

// refusal is the error in an answer's body: a notBegunError, where the request can be sent again.
func (c *Client) refusal(method, path string, resp *http.Response, body []byte) error {
	e := &Error{}
	if json.Unmarshal(body, e) != nil || e.Message == "" {
		return Errorf(CodeInternal, "%s answered %s %s with %s: is it a rootless-ovl daemon of this version?", c.socket, method, path, resp.Status)
	}
	if resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get(headerAgain) != "" {
		return &notBegunError{e}
	}
	return e
}

// checkSocket finds, before connecting, what a connection would only fail on without saying why.
func (c *Client) checkSocket() error {
	fi, err := os.Lstat(c.socket)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return c.notRunning()
	case errors.Is(err, os.ErrPermission):
		return Errorf(CodeDenied, "no access to %s: the daemon is another user's, run this as that user", c.socket)
	case err != nil:
		return Errorf(CodeInternal, "the daemon's socket: %w", err)
	case fi.Mode().Type() != os.ModeSocket:
		return Errorf(CodeInvalid, "%s is not a socket: look at --runtime-dir", c.socket)
	}
	if owner := ownerOf(fi); owner != os.Geteuid() {
		return Errorf(CodeDenied, "the daemon at %s belongs to uid %d and answers that user only: run this as that user", c.socket, owner)
	}
	return nil
}

func (c *Client) notRunning() error {
	return &Error{
		Message: fmt.Sprintf("the daemon is not running (nobody listens on %s): start it with `rootless-ovl up`, or point --runtime-dir at its directory", c.socket),
		Code:    CodeUnavailable,
		cause:   ErrNotRunning,
	}
}

func (c *Client) transportError(ctx context.Context, err error) error {
	// A daemon that hangs still has its connections taken by the kernel, until too many wait.
	if errors.Is(ctx.Err(), context.DeadlineExceeded) || errors.Is(err, syscall.EAGAIN) {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return Errorf(CodeUnavailable, "the daemon at %s does not answer (%w): look at its log; if it hangs, start it again", c.socket, err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("waiting for the daemon at %s: %w", c.socket, context.Cause(ctx))
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err // without the made-up URL
	}
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
		return c.notRunning()
	}
	return Errorf(CodeUnavailable, "the daemon at %s went away before it answered (%w): look at its log", c.socket, err)
}
