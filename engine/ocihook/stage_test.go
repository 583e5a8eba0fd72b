// A daemon, a host's /proc and a container's bundle that are not.

package ocihook

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	containerA = "3f1c9a0b7d2e4f5061728394a5b6c7d8e9f00112233445566778899aabbccdde"
	containerB = "9912aa0b7d2e4f5061728394a5b6c7d8e9f00112233445566778899aabbccdde"
	hostInode  = 4026531840
	newInode   = 4026532001
	podInode   = 4026532002
	pidA       = 4242 // in newInode
	pidB       = 4243 // in podInode
	infra      = 4200 // likewise
)

// fakeDaemon keeps attachments as the daemon does.
type fakeDaemon struct {
	list     []api.Attachment
	attached []api.AttachRequest
	detached []string

	down      int   // so many questions find nobody
	attachErr error // of the next attach
	between   func()
}

func (d *fakeDaemon) here() error {
	if d.down == 0 {
		return nil
	}
	d.down--
	return api.Errorf(api.CodeUnavailable, "the daemon is not running: start it with `rootless-ovl up`")
}

func (d *fakeDaemon) Attach(_ context.Context, r api.AttachRequest) (api.Attachment, error) {
	if err := d.here(); err != nil {
		return api.Attachment{}, err
	}
	if err := r.Validate(); err != nil {
		return api.Attachment{}, err
	}
	if d.between != nil {
		d.between()
	}
	if err := d.attachErr; err != nil {
		d.attachErr = nil
		return api.Attachment{}, err
	}
	d.attached = append(d.attached, r)
	att := api.Attachment{Name: r.Name, PID: r.PID, Owner: r.Owner, DNS: &api.DNS{Server: "10.213.7.1", Search: []string{"ovl.internal"}}}
	d.list = append(d.list, att)
	return att, nil
}

func (d *fakeDaemon) DetachSoon(ctx context.Context, ref, owner string) error {
	return d.Detach(ctx, ref, owner)
}

func (d *fakeDaemon) Detach(_ context.Context, ref, owner string) error {
	if err := d.here(); err != nil {
		return err
	}
	d.detached = append(d.detached, ref)
	d.list = slices.DeleteFunc(d.list, func(a api.Attachment) bool { return a.Name == ref && a.Owner == owner })
	return nil
}

func (d *fakeDaemon) Attachments(context.Context) ([]api.Attachment, error) {
	return slices.Clone(d.list), d.here()
}

func (d *fakeDaemon) AttachmentsOf(_ context.Context, owner string) (list []api.Attachment, err error) {
	for _, a := range d.list {
		if a.Owner == owner {
			list = append(list, a)
		}
	}
	return list, d.here()
}

// stage is where a hook runs.
type stage struct {
	t      *testing.T
	daemon *fakeDaemon
	hook   *Hook
	stderr bytes.Buffer
	dir    string
	config map[string]any // of the bundle
}

func newStage(t *testing.T) *stage {
	s := &stage{t: t, daemon: &fakeDaemon{}, dir: t.TempDir()}
	s.hook = New(s.daemon, &s.stderr)
	s.hook.proc, s.hook.parent, s.hook.patience = filepath.Join(s.dir, "proc"), 4000, 0
	s.hook.storageConf = []string{filepath.Join(s.dir, "storage.conf")}
	s.hook.hostResolvConf = s.write("resolv.conf", "search lan\nnameserver 192.0.2.53\n")
	s.netns("self", hostInode)
	s.netns("4242", newInode)
	s.netns("4243", podInode)
	s.netns("4200", podInode)
	s.network(pidA, loOnly, noRoutes)
	s.network(pidB, loOnly, noRoutes)
	s.write("proc/4000/cmdline", "crun\x00create\x00")
	s.write("bundle/rootfs/etc/hosts", "127.0.0.1 localhost\n")
	s.config = map[string]any{"root": map[string]any{"path": "rootfs"}, "linux": map[string]any{"namespaces": []any{
		map[string]any{"type": "pid"}, map[string]any{"type": "network"},
	}}}
	return s
}

const (
	loOnly   = "Inter-|   Receive\n face |bytes\n    lo:       0       0\n sit0: 0 0\n"
	noRoutes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n"
)

func (s *stage) write(name, content string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		s.t.Fatal(err)
	}
	return path
}

func (s *stage) read(name string) string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}

// netns puts a process into a network namespace.
func (s *stage) netns(process string, inode uint64) {
	s.t.Helper()
	dir := filepath.Join(s.dir, "proc", process, "ns")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Symlink(fmt.Sprintf("net:[%d]", inode), filepath.Join(dir, "net")); err != nil {
		s.t.Fatal(err)
	}
}

// network is what the kernel says of a process's network.
func (s *stage) network(pid int, dev, route string) {
	s.write(fmt.Sprintf("proc/%d/net/dev", pid), dev)
	s.write(fmt.Sprintf("proc/%d/net/route", pid), route)
	s.write(fmt.Sprintf("proc/%d/net/ipv6_route", pid), strings.Repeat("0", 32)+" 00 "+strings.Repeat("0", 32)+" 00 "+strings.Repeat("0", 32)+" ffffffff 00000001 00000000 00200200       lo\n")
}

// sharesWith has the container in another's namespace.
func (s *stage) sharesWith(pid int) {
	s.config["linux"] = map[string]any{"namespaces": []any{map[string]any{"type": "network", "path": fmt.Sprintf("/proc/%d/ns/net", pid)}}}
}

// mounts has the container see files of the host.
func (s *stage) mounts(sourceOf map[string]string) {
	var list []any
	for destination, source := range sourceOf {
		list = append(list, map[string]any{"destination": destination, "source": source, "type": "bind"})
	}
	s.config["mounts"] = list
}

// run runs the hook for a container at a stage.
func (s *stage) run(status, id string, pid int, annotations map[string]string) error {
	s.t.Helper()
	config, err := json.Marshal(s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write("bundle/config.json", string(config))
	state, err := json.Marshal(map[string]any{"ociVersion": "1.0", "id": id, "status": status, "pid": pid, "bundle": filepath.Join(s.dir, "bundle"), "annotations": annotations})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.hook.Run(s.t.Context(), bytes.NewReader(state))
}

// create runs the hook for container A at createRuntime.
func (s *stage) create(annotations map[string]string) error {
	s.t.Helper()
	return s.run("created", containerA, pidA, annotations)
}
