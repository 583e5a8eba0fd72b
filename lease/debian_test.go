// This file runs the suite on the etcd that Debian ships, as a process that is killed and started again.

package lease_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

const debianEtcd = "/usr/bin/etcd"

func TestRegistry_PassesTheSuiteOnDebiansEtcd(t *testing.T) {
	skipWithoutEtcd(t)
	leasetest.Run(t, func(t *testing.T) leasetest.Lab {
		e := newProcess(t)
		e.start(t)
		return leasetest.Lab{
			Dial:    func(t *testing.T) lease.Store { return dial(t, lease.ClientConfig{Endpoints: []string{e.client}}) },
			Stop:    e.kill,
			Start:   e.start,
			Compact: func(t *testing.T) { compact(t, e.client) },
			Wipe:    func(t *testing.T) { wipe(t, e.dir) },
			Save:    func(t *testing.T) func(*testing.T) { return save(t, e.dir) },
		}
	})
}

func skipWithoutEtcd(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath(debianEtcd); err != nil {
		t.Skipf("%s is not installed: apt-get install etcd-server", debianEtcd)
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func dial(t *testing.T, c lease.ClientConfig) *lease.Client {
	t.Helper()
	client, err := lease.Dial(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return client
}

// freePort is a URL on loopback where nothing listens now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a test's listener
	return "http://" + l.Addr().String()
}

func compact(t *testing.T, endpoint string) {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // a test's client
	resp, err := c.Get(testContext(t), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(testContext(t), resp.Header.Revision); err != nil {
		t.Fatal(err)
	}
}

// wipe empties a data directory that nobody uses.
func wipe(t *testing.T, dir string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
}

// save copies a data directory that nobody uses; what it returns puts the copy in its place.
func save(t *testing.T, dir string) (restore func(t *testing.T)) {
	t.Helper()
	saved := filepath.Join(t.TempDir(), "saved")
	if err := os.CopyFS(saved, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T) {
		t.Helper()
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(dir, os.DirFS(saved)); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
}

// process is one etcd process on one data directory.
type process struct {
	client string // URL
	dir    string
	args   []string
	cmd    *exec.Cmd
	out    bytes.Buffer
}

func newProcess(t *testing.T, more ...string) *process {
	t.Helper()
	skipWithoutEtcd(t)
	client, peer, dir := freePort(t), freePort(t), t.TempDir()
	return &process{client: client, dir: dir, args: append(more, "--data-dir", dir, "--name", "suite", "--logger", "zap", "--log-level", "error",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "suite="+peer,
		"--heartbeat-interval", "10", "--election-timeout", "100")}
}

// launch starts the process and does not wait for it to answer.
func (p *process) launch(t *testing.T) {
	t.Helper()
	p.out.Reset()
	p.cmd = exec.Command(debianEtcd, p.args...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill(t) })
}

// start is launch until it answers.
func (p *process) start(t *testing.T) {
	t.Helper()
	p.launch(t)
	c := dial(t, lease.ClientConfig{Endpoints: []string{p.client}, Timeout: time.Second})
	var err error
	for range 200 {
		if _, _, err = c.Get(testContext(t), "x", false); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	p.kill(t)
	t.Fatalf("%s does not answer: %v\n%s", debianEtcd, err, p.out.String())
}

// kill is the hard way, so that the data directory has to recover.
func (p *process) kill(t *testing.T) {
	if p.cmd.ProcessState != nil {
		return
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Error(fmt.Errorf("killing etcd: %w", err))
	}
	_ = p.cmd.Wait() // "signal: killed"
}

// terminate lets the process write what it has.
func (p *process) terminate(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = p.cmd.Wait() // "signal: terminated"
}
