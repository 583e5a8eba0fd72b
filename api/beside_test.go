// A socket beside the API's.

package api

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestListenBeside_TellsWhoAsks(t *testing.T) {
	dir := t.TempDir()
	stale, err := net.Listen("unix", filepath.Join(dir, "other.sock"))
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	ln, err := ListenBeside(dir, "other.sock")
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "other.sock")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", fi.Mode(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- Serve(ctx, ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			pid, _ := CallerPID(r.Context())
			_, _ = io.WriteString(w, strconv.Itoa(pid))
		}), slog.New(slog.DiscardHandler))
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "other.sock"))
	}}}
	resp, err := client.Get("http://x/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != strconv.Itoa(os.Getpid()) {
		t.Errorf("asked by %q, want %d (%v)", b, os.Getpid(), err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestListenBeside_RefusesWhatIsInTheWay(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, what := range map[string]string{"file": "not a socket", strings.Repeat("n", maxSocketPath): "--runtime-dir"} {
		if _, err := ListenBeside(dir, name); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%.10s: %v", name, err)
		}
	}
}
