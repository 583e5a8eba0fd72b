// Tests of the container's resolv.conf: whose file is written, and whose is not.

package ocihook

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	fromHost   = "nameserver 10.213.7.1\nsearch ovl.internal lan\n"
	inRootfs   = "bundle/rootfs/etc/resolv.conf"
	engineFile = "run/overlay-containers/" + containerB + "/userdata/resolv.conf"
)

var attach = map[string]string{"run.rootless-ovl.attach": "web"}

func TestResolvConf_OfAContainerWithoutOne(t *testing.T) {
	s := newStage(t)
	if err := s.create(attach); err != nil {
		t.Fatal(err)
	}
	if got := s.read(inRootfs); got != fromHost {
		t.Errorf("%q, want %q", got, fromHost)
	}
	entries, err := os.ReadDir(filepath.Join(s.dir, "bundle/rootfs/etc"))
	if err != nil || len(entries) != 2 {
		t.Errorf("in /etc: %v, %v", entries, err)
	}
}

func TestResolvConf_StaysInsideTheRoot(t *testing.T) {
	for _, target := range []string{"OUTSIDE", "../../../victim", "../run/nowhere/stub", "/victim"} {
		s := newStage(t)
		victim := s.write("victim", "theirs\n")
		if err := os.Symlink(strings.ReplaceAll(target, "OUTSIDE", victim), filepath.Join(s.dir, inRootfs)); err != nil {
			t.Fatal(err)
		}
		if err := s.create(attach); err != nil {
			t.Fatal(err)
		}
		if got := s.read("victim"); got != "theirs\n" {
			t.Errorf("%s: the host's file is %q", target, got)
		}
		if fi, err := os.Lstat(filepath.Join(s.dir, inRootfs)); err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm() != 0o644 {
			t.Errorf("%s: %v, %v", target, fi, err)
		}
	}
	s := newStage(t)
	s.config["root"] = map[string]any{"path": "evil"}
	s.write("elsewhere/hosts", "")
	if err := os.MkdirAll(filepath.Join(s.dir, "bundle/evil"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(s.dir, "elsewhere"), filepath.Join(s.dir, "bundle/evil/etc")); err != nil {
		t.Fatal(err)
	}
	err := s.create(attach)
	if err == nil || !strings.Contains(err.Error(), "run.rootless-ovl.dns=keep") {
		t.Errorf("an /etc outside: %v", err)
	}
	if len(s.daemon.list) != 0 {
		t.Errorf("a container that is not started is attached: %+v", s.daemon.list)
	}
	if entries, err := os.ReadDir(filepath.Join(s.dir, "elsewhere")); err != nil || len(entries) != 1 {
		t.Errorf("outside: %v, %v", entries, err)
	}
}

func TestResolvConf_WhereTheContainerSeesEtc(t *testing.T) {
	for _, target := range []string{"/system/etc", "system/etc", "../../../system/etc", "/etc2"} {
		s := newStage(t)
		s.config["root"] = map[string]any{"path": "linked"}
		s.write("bundle/linked/system/etc/resolv.conf", "nameserver 9.9.9.9\n")
		s.write("system/etc/resolv.conf", "theirs\n")
		for to, name := range map[string]string{target: "etc", "/system/etc": "etc2"} {
			if err := os.Symlink(to, filepath.Join(s.dir, "bundle/linked", name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.create(attach); err != nil {
			t.Errorf("%s: %v", target, err)
		}
		if got := s.read("bundle/linked/system/etc/resolv.conf"); got != fromHost {
			t.Errorf("%s: %q, want %q", target, got, fromHost)
		}
		if got := s.read("system/etc/resolv.conf"); got != "theirs\n" {
			t.Errorf("%s: the host's file is %q", target, got)
		}
	}
}

func TestResolvConf_OfARootWithoutEtc(t *testing.T) {
	s := newStage(t)
	s.config["root"] = map[string]any{"path": filepath.Join(s.dir, "scratch")}
	if err := os.Mkdir(filepath.Join(s.dir, "scratch"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.create(attach); err != nil {
		t.Fatal(err)
	}
	if got := s.read("scratch/etc/resolv.conf"); got != fromHost {
		t.Errorf("%q", got)
	}
}

func TestResolvConf_OfTheEngineIsWrittenInPlace(t *testing.T) {
	s := newStage(t)
	path := s.write(engineFile, "search corp\nnameserver 10.0.2.3\noptions timeout:2\n")
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	s.mounts(map[string]string{"/etc/resolv.conf": path})
	if err := s.create(attach); err != nil {
		t.Fatal(err)
	}
	if got, want := s.read(engineFile), "nameserver 10.213.7.1\nsearch ovl.internal corp\noptions timeout:2\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) {
		t.Errorf("another file now, which a mount that was made before does not show: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(s.dir, inRootfs)); err == nil {
		t.Error("the root has one, too")
	}
}

func TestResolvConf_OfTheUserIsLeftAlone(t *testing.T) {
	for _, destination := range []string{"/etc/resolv.conf", "/etc/./resolv.conf", "/etc", "/etc/"} {
		s := newStage(t)
		mine := s.write("home/etc/resolv.conf", "nameserver 9.9.9.9\n")
		source := mine
		if !strings.HasSuffix(destination, "conf") {
			source = filepath.Dir(mine)
		}
		s.mounts(map[string]string{destination: source})
		if err := s.create(attach); err != nil {
			t.Fatal(err)
		}
		if got := s.read("home/etc/resolv.conf"); got != "nameserver 9.9.9.9\n" {
			t.Errorf("%s: the user's file is %q", destination, got)
		}
		if _, err := os.Lstat(filepath.Join(s.dir, inRootfs)); err == nil {
			t.Errorf("%s: the root has one, which the mount hides", destination)
		}
	}
}

func TestResolvConf_IsKeptOnDemand(t *testing.T) {
	s := newStage(t)
	s.write(inRootfs, "nameserver 9.9.9.9\n")
	if err := s.create(map[string]string{"run.rootless-ovl.dns": "keep"}); err != nil {
		t.Fatal(err)
	}
	if got := s.read(inRootfs); got != "nameserver 9.9.9.9\n" {
		t.Errorf("%q", got)
	}
}

// As newer versions of podman do for a container with a network of its own: the file is empty until the container has been created.
func TestResolvConf_IsWrittenAgainAtPoststart(t *testing.T) {
	const podmans, ours = "nameserver 10.0.2.3\nsearch corp\n", "nameserver 10.213.7.1\nsearch ovl.internal corp\n"
	for name, tt := range map[string]struct {
		annotations map[string]string
		change      func(s *stage)
		want        string
	}{
		"attached":        {attach, func(*stage) {}, ours},
		"kept":            {map[string]string{"run.rootless-ovl.dns": "keep"}, func(*stage) {}, podmans},
		"not attached":    {attach, func(s *stage) { s.daemon.list = nil }, podmans},
		"no daemon":       {attach, func(s *stage) { s.daemon.down = 1 }, podmans},
		"ended meanwhile": {attach, func(s *stage) { _ = os.Remove(filepath.Join(s.hook.proc, "4242/ns/net")) }, podmans},
		"no container's":  {attach, func(s *stage) { s.config["mounts"] = nil }, podmans},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			s.mounts(map[string]string{"/etc/resolv.conf": s.write(engineFile, "")})
			if err := s.create(tt.annotations); err != nil {
				t.Fatal(err)
			}
			s.daemon.list[0].Inode = newInode
			s.write(engineFile, podmans)
			tt.change(s)
			if err := s.run("running", containerA, pidA, tt.annotations); err != nil {
				t.Errorf("%v: a runtime ends the container for this", err)
			}
			if got := s.read(engineFile); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
			if len(s.daemon.attached) != 1 || len(s.daemon.detached) != 0 {
				t.Errorf("attached %+v, detached %v", s.daemon.attached, s.daemon.detached)
			}
		})
	}
}

// As runc before 1.3 runs poststart.
func TestResolvConf_AtAPoststartThatLooksLikeCreateRuntime(t *testing.T) {
	s := newStage(t)
	s.mounts(map[string]string{"/etc/resolv.conf": s.write(engineFile, "")})
	for range 2 {
		if err := s.create(attach); err != nil {
			t.Fatal(err)
		}
		s.daemon.list[0].Inode = newInode
	}
	if len(s.daemon.attached) != 1 || len(s.daemon.detached) != 0 {
		t.Errorf("attached %+v, detached %v", s.daemon.attached, s.daemon.detached)
	}
}
