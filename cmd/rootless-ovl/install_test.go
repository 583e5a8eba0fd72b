// install and uninstall: what they choose, what they say, and that the manual has every command.

package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/engine/install"
)

// withMachine has these programs on the search path, that version of podman, and systemd.
func (b *bench) withMachine(podman string, programs ...string) *bench {
	b.world.podmanVersion = func(context.Context) string { return podman }
	b.world.onPath = func(p string) bool { return slices.Contains(programs, p) }
	b.world.systemdRuns = func() bool { return true }
	return b
}

func home(t *testing.T, path string) string {
	t.Helper()
	return filepath.Join(os.Getenv("HOME"), path)
}

func TestInstall_IsForWhatIsFound(t *testing.T) {
	b := newBench(t).withMachine("podman version 4.3.1", "dockerd", "bash", "man")
	dry := b.must("install", "--dry-run")
	if entries, err := os.ReadDir(os.Getenv("HOME")); err != nil || len(entries) != 0 {
		t.Fatalf("--dry-run wrote %v, %v", entries, err)
	}
	for _, want := range []string{"+hooks_dir = [", "+++ " + home(t, ".config/systemd/user/rootless-ovl.service"), "- flags of the daemon"} {
		if !strings.Contains(dry, want) {
			t.Errorf("--dry-run does not say %q:\n%s", want, dry)
		}
	}
	out := b.must("install")
	for path, has := range map[string]string{
		".local/share/rootless-ovl/hooks.d/rootless-ovl.json":           `"^run\\.rootless-ovl\\."`,
		".config/containers/containers.conf.d/50-rootless-ovl.conf":     "hooks_dir",
		".local/lib/docker/plugins/rootless-ovl.spec":                   "unix://" + b.dir + "/docker.sock\n",
		".config/systemd/user/rootless-ovl.service":                     `ExecStart="/usr/bin/rootless-ovl" --runtime-dir "` + b.dir + `"`,
		".config/systemd/user/sockets.target.wants/rootless-ovl.socket": "ListenStream=" + b.dir + "/api.sock\n",
		".config/rootless-ovl/up.env":                                   "ROOTLESS_OVL_UP=\n",
		".local/share/bash-completion/completions/rootless-ovl":         "__start_rootless-ovl",
		".local/share/man/man1/rootless-ovl-config-set.1":               "ROOTLESS-OVL-CONFIG-SET",
	} {
		if text, err := os.ReadFile(home(t, path)); err != nil || !strings.Contains(string(text), has) {
			t.Errorf("%s: %v, %q", path, err, text)
		}
		if !strings.Contains(out, home(t, path)+"\n") {
			t.Errorf("install does not tell of %s", path)
		}
	}
	for _, path := range []string{".config/cni", ".config/fish", ".local/share/zsh", ".local/share/rootless-ovl/netavark"} {
		if _, err := os.Stat(home(t, path)); err == nil {
			t.Errorf("%s is there", path)
		}
	}
	if out := b.must("install"); !strings.HasPrefix(out, "nothing to do\n") {
		t.Errorf("the second time: %s", out)
	}
	if out := b.must("uninstall", "systemd", "shell"); !strings.Contains(out, "remove "+home(t, ".config/rootless-ovl/up.env")) || !strings.Contains(out, "systemctl --user stop") {
		t.Errorf("uninstall says\n%s", out)
	}
	b.must("uninstall")
	if entries, err := os.ReadDir(os.Getenv("HOME")); err != nil || len(entries) != 0 {
		t.Errorf("uninstall left %v, %v", entries, err)
	}
}

func TestInstall_TellsProgramsWhatItDid(t *testing.T) {
	b := newBench(t).withMachine("podman version 4.3.1")
	var got installResult
	if err := json.Unmarshal([]byte(b.must("install", "podman", "--every-container", "-o", "json")), &got); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(got.Changes, func(c installChange) bool { return strings.HasSuffix(c.Path, "rootless-ovl.json") })
	if got.DryRun || i < 0 || got.Changes[i].Mode != "0644" || !strings.Contains(got.Changes[i].Content, `"always": true`) || got.Foreign == nil || got.Kept == nil {
		t.Errorf("%+v", got)
	}
}

func TestInstall_SaysWhatToDo(t *testing.T) {
	b := newBench(t)
	tests := []struct {
		args []string
		code int
		says string
	}{
		{[]string{"install"}, exitFailed, "rootless-ovl install podman"},
		{[]string{"install", "podmann"}, exitUsage, "use podman, docker"},
		{[]string{"uninstall", "x"}, exitUsage, "use podman, docker"},
		{[]string{"install", "docker", "--every-container"}, exitUsage, "install podman --every-container"},
	}
	for _, tt := range tests {
		if code := b.run(tt.args...); code != tt.code || !strings.Contains(b.err.String(), tt.says) {
			t.Errorf("%v: exit status %d, %s", tt.args, code, &b.err)
		}
	}
	if out := b.must("install", "systemd"); !strings.Contains(out, "no systemd here") || !strings.Contains(out, "setsid -f '/usr/bin/rootless-ovl' up") {
		t.Errorf("without systemd: %s", out)
	}
	b.world.pluginPath = func() string { return "" }
	if code := b.run("install", "cni"); code != exitFailed || !strings.Contains(b.err.String(), "rootless-ovl-plugin, which engines start, is neither in /usr/bin") {
		t.Errorf("without the engines' program: exit status %d, %s", code, &b.err)
	}
	if err := os.WriteFile(home(t, ".config/systemd/user/rootless-ovl.socket"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.world.programPath = func() string { return "/elsewhere/rootless-ovl" }
	if code := b.run("install", "docker"); code != exitFailed || !strings.Contains(b.err.String(), "rootless-ovl.socket was changed") {
		t.Errorf("exit status %d, %s", code, &b.err)
	}
	if out := b.must("uninstall"); !strings.Contains(out, "left "+home(t, ".config/systemd/user/rootless-ovl.socket")) {
		t.Errorf("uninstall says\n%s", out)
	}
}

func TestManPages_HaveEveryCommand(t *testing.T) {
	b := newBench(t)
	root := (&app{world: b.world}).root()
	pages := map[string][]byte{}
	if err := manPages(root, start, pages); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range root.Commands() {
		if _, ok := pages["rootless-ovl-"+cmd.Name()+".1"]; cmd.Name() != "help" && ok == cmd.Hidden {
			t.Errorf("%s: page %t, hidden %t", cmd.Name(), ok, cmd.Hidden)
		}
	}
	if !strings.Contains(string(pages["rootless-ovl-up.1"]), "etcd-endpoints") {
		t.Errorf("the page of up:\n%s", pages["rootless-ovl-up.1"])
	}
	again := map[string][]byte{}
	if err := manPages((&app{world: b.world}).root(), start, again); err != nil {
		t.Fatal(err)
	}
	if string(again["rootless-ovl.1"]) != string(pages["rootless-ovl.1"]) {
		t.Error("the page is another one each time")
	}
}

func TestOwnPath_IsThisProgram(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "rootless-ovl")
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	was := os.Args[0]
	defer func() { os.Args[0] = was }()
	for _, tt := range []struct{ called, want string }{{link, link}, {"no-such-program", self}, {"/bin/sh", self}} {
		os.Args[0] = tt.called
		if got := ownPath(); got != tt.want {
			t.Errorf("called as %s: %s, want %s", tt.called, got, tt.want)
		}
	}
	if got := partsOf([]string{"podman"}); !slices.Equal(got, []install.Part{install.Podman}) {
		t.Errorf("%v", got)
	}
}

func TestPluginPath_IsBesideThisProgramOrOnThePath(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir())
	if got := pluginPath(); got != "" {
		t.Errorf("without one: %s", got)
	}
	there := func(dir string) string {
		path := filepath.Join(dir, install.PluginName)
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if want, got := there(os.Getenv("PATH")), pluginPath(); got != want {
		t.Errorf("on PATH: %s, want %s", got, want)
	}
	beside := there(filepath.Dir(self))
	defer os.Remove(beside)
	if got := pluginPath(); got != beside {
		t.Errorf("beside the program: %s, want %s", got, beside)
	}
	link := filepath.Join(t.TempDir(), "rootless-ovl")
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	was := os.Args[0]
	defer func() { os.Args[0] = was }()
	os.Args[0] = link
	if got := pluginPath(); got != beside {
		t.Errorf("beside the program that a link leads to: %s, want %s", got, beside)
	}
	if want, got := there(filepath.Dir(link)), pluginPath(); got != want {
		t.Errorf("beside the link: %s, want %s", got, want)
	}
}
