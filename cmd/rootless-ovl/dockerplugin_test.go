// What `up` serves docker with.

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/node"
)

// withoutDocker is a program on a host where no dockerd is to be found.
func withoutDocker() *app {
	return &app{world: world{dockerLink: func(context.Context, func() (int, bool, error), *slog.Logger) {}}}
}

func TestServeDocker_AnswersUntilItEnds(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- withoutDocker().serveDocker(ctx, node.Config{RuntimeDir: dir, StateDir: dir, Log: slog.New(slog.DiscardHandler)}, sight{}, beside(dir))
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "docker.sock"))
	}}}
	var resp *http.Response
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		var err error
		if resp, err = client.Post("http://x/Plugin.Activate", "", nil); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(b), "NetworkDriver") {
		t.Errorf("%s %v", b, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "docker.sock")); err == nil {
		t.Error("the socket is left behind")
	}
}

func TestServeDocker_LeavesTheNodeAloneWhenItCannot(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "docker.sock"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var log bytes.Buffer
	if err := withoutDocker().serveDocker(ctx, node.Config{RuntimeDir: dir, StateDir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))}, sight{}, beside(dir)); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "docker.sock is in the way") {
		t.Errorf("log %q", log.String())
	}
}

// beside listens in a runtime directory as a node has it done.
func beside(dir string) func(string) (net.Listener, error) {
	return func(name string) (net.Listener, error) { return api.ListenBeside(dir, name) }
}
