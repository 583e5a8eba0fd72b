// The program run in this process, against a daemon that is not one.

package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// fakeDaemon has attachments and notes what is taken off. Of an api.Backend it has what these tests ask for.
type fakeDaemon struct {
	api.Backend
	attachments []api.Attachment

	mu    sync.Mutex
	notes []string
}

func (f *fakeDaemon) Attachments(context.Context) ([]api.Attachment, error) {
	return f.attachments, nil
}

func (f *fakeDaemon) Detach(_ context.Context, ref, _ string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.notes = append(f.notes, "detach "+ref)
	return nil
}

func (f *fakeDaemon) DetachSoon(ctx context.Context, ref, owner string) error {
	return f.Detach(ctx, ref, owner)
}

func (f *fakeDaemon) noted() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.notes)
}

// bench is a place to run command lines in, with a runtime directory that the environment names.
type bench struct {
	t        *testing.T
	dir      string
	out, err bytes.Buffer // of the last run
}

// newBench has no daemon yet.
func newBench(t *testing.T) *bench {
	t.Helper()
	base, err := os.MkdirTemp("", "ovl") // short enough for sun_path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	b := &bench{t: t, dir: filepath.Join(base, "run")}
	t.Setenv(envRuntimeDir, b.dir)
	t.Setenv("XDG_RUNTIME_DIR", "")
	return b
}

// serve has a daemon on the bench's socket.
func (b *bench) serve(f *fakeDaemon) {
	b.t.Helper()
	ln, err := api.Listen(b.dir)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.Serve(ctx, ln, api.Handler(f), slog.New(slog.DiscardHandler)) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("Serve: %v", err)
		}
	})
}

// run runs one command line and returns its exit status.
func (b *bench) run(stdin string, args ...string) int {
	b.out.Reset()
	b.err.Reset()
	return call{stdin: strings.NewReader(stdin), stdout: &b.out, stderr: &b.err}.execute(b.t.Context(), args)
}

func TestExecute_IsForEngines(t *testing.T) {
	for _, tt := range []struct {
		args   []string
		status int
		says   string // on standard error, or on standard output where it is done
	}{
		{nil, exitUsage, "--help"},
		{[]string{"nomad"}, exitUsage, `"nomad" is no kind of engine`},
		{[]string{"--runtime-dir"}, exitUsage, "--runtime-dir is empty"},
		{[]string{"--runtime-dir=", "cni"}, exitUsage, "--runtime-dir is empty"},
		{[]string{"--state-dir", "/x", "cni"}, exitUsage, "--state-dir is no flag"},
		{[]string{"cni", "x"}, exitUsage, "standard input"},
		{[]string{"oci-hook", "web"}, exitUsage, "standard input"},
		{[]string{"--help"}, 0, "oci-hook"},
		{[]string{"--version"}, 0, "rootless-ovl-plugin " + thisVersion() + "\n"},
		{[]string{"netavark", "info"}, 0, thisVersion()},
	} {
		b := newBench(t)
		status := b.run("", tt.args...)
		said, silent := b.out.String(), b.err.String()
		if tt.status != 0 {
			said, silent = silent, said
		}
		if status != tt.status || !strings.Contains(said, tt.says) || silent != "" {
			t.Errorf("%v: exit status %d, %q, %q", tt.args, status, &b.out, &b.err)
		}
	}
}

func TestExecute_FindsTheDaemonByFlagAndEnvironment(t *testing.T) {
	b := newBench(t)
	f := &fakeDaemon{attachments: []api.Attachment{{Name: "web", Owner: "oci/3f1c"}}}
	b.serve(f)
	const state = `{"id": "3f1c", "status": "stopped", "bundle": "/b"}`
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	for i, args := range [][]string{nil, {"--runtime-dir", b.dir}, {"--runtime-dir=" + b.dir}} {
		if i > 0 {
			t.Setenv(envRuntimeDir, "/nowhere")
		}
		if status := b.run(state, append(args, "oci-hook")...); status != 0 || len(f.noted()) != i+1 {
			t.Errorf("%v: exit status %d, %s; asked for %v", args, status, &b.err, f.noted())
		}
	}
}
