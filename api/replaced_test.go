// Tests of requests that a daemon does not begin with, as it is being replaced.

package api

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// replacedAt has the first requests on a socket answered by a daemon that is being replaced, and the rest by h. It counts connections.
func replacedAt(t *testing.T, first int32, h http.Handler) (c *Client, dialled *atomic.Int32) {
	t.Helper()
	ln, err := Listen(shortDir(t) + "/run")
	if err != nil {
		t.Fatal(err)
	}
	dialled = new(atomic.Int32)
	var asked atomic.Int32
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if asked.Add(1) <= first {
				WriteReplaced(w, r)
				return
			}
			h.ServeHTTP(w, r)
		}),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			dialled.Add(1)
			return ctx
		},
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelWarn),
	}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close() })
	return NewClient(ln.Path()), dialled
}

func TestClient_SendsAgainWhatADaemonThatIsReplacedHasNotBegun(t *testing.T) {
	config := json.RawMessage(`{"Network":"` + strings.Repeat("x", MaxBody/2) + `"}`) // more than a socket takes at once
	b := &fakeBackend{carry: func(_ context.Context, _ string, s *Stream) { s.Close() }}
	for what, send := range map[string]func(*Client) error{
		"attach": func(c *Client) error {
			a, err := c.Attach(t.Context(), AttachRequest{PID: 7, Name: "web"})
			if err == nil && (a.Name != "web" || len(b.attached) != 1) {
				t.Errorf("%+v; the daemon was asked %+v", a, b.attached)
			}
			return err
		},
		"a large body": func(c *Client) error {
			err := c.SetConfig(t.Context(), config)
			if err == nil && len(b.config) != len(config) {
				t.Errorf("%d bytes came of %d", len(b.config), len(config))
			}
			return err
		},
		"status": func(c *Client) error { _, err := c.Status(t.Context()); return err },
		"dial": func(c *Client) error {
			s, err := c.Dial(t.Context(), "web:80")
			if err == nil {
				s.Close()
			}
			return err
		},
	} {
		t.Run(what, func(t *testing.T) {
			c, dialled := replacedAt(t, 3, Handler(b))
			if err := send(c); err != nil {
				t.Error(err)
			}
			if n := dialled.Load(); n != 4 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

func TestClient_SendsNothingAgainThatMayHaveBegun(t *testing.T) {
	b := &fakeBackend{err: Errorf(CodeUnavailable, "the store is away")}
	c, dialled := replacedAt(t, 0, Handler(b))
	if _, err := c.Attach(t.Context(), AttachRequest{PID: 7}); !errors.Is(err, ErrUnavailable) || dialled.Load() != 1 {
		t.Errorf("%v, %d connections", err, dialled.Load())
	}
}

func TestAgain_GivesUpWithTheDaemonsError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		replaced := Errorf(CodeUnavailable, "just replaced")
		send := func() (int, error) { return 0, &notBegunError{replaced} }
		if _, err := again(t.Context(), send); err != error(replaced) { //nolint:errorlint // that very one
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := again(ctx, send); err != error(replaced) { //nolint:errorlint // that very one
			t.Errorf("got %v", err)
		}
	})
}
