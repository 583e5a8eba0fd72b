// A home is installed into and put back, as a whole, in pieces and interrupted, and nothing of its own is touched.

package install

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// whole is the file system as Setup looks at it.
var whole = os.DirFS("/")

// homeOf is a Setup in a home of its own.
func homeOf(t *testing.T, podman string) Setup {
	t.Helper()
	return homeIn(t.TempDir(), podman)
}

func homeIn(home, podman string) Setup {
	return Setup{
		Program: filepath.Join(home, "bin", "rootless-ovl"), Plugin: filepath.Join(home, "bin", PluginName), RuntimeDir: filepath.Join(home, "run", "rootless-ovl"),
		StateDir: filepath.Join(home, ".local", "state", "rootless-ovl"), ConfigHome: filepath.Join(home, ".config"),
		DataHome: filepath.Join(home, ".local", "share"), LibHome: filepath.Join(home, ".local", "lib"),
		Completions:   map[string][]byte{"bash": []byte("# bash\n"), "zsh": []byte("#compdef\n"), "fish": []byte("# fish\n"), "other": []byte("x")},
		ManPages:      map[string][]byte{"rootless-ovl.1": []byte(".TH\n")},
		PodmanVersion: podman, SystemdRuns: true,
	}
}

func (s Setup) home() string { return filepath.Dir(filepath.Dir(s.Program)) }

// furnish is a home whose user has configured everything already.
func furnish(t *testing.T, s Setup) {
	t.Helper()
	long := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	for path, file := range map[string]struct {
		text string
		mode fs.FileMode
	}{
		".config/containers/containers.conf":                   {"# mine\n[engine]\nhooks_dir = [\"/mine/hooks.d\"] # do not lose it\n\n[containers]\nlog_driver = \"k8s-file\"\n", 0o640},
		".config/containers/containers.conf.d/10-network.conf": {"[network]\ncni_plugin_dirs = [\"/mine/cni\"]\n", 0o600},
		".config/containers/oci/hooks.d/mine.json":             {"{\"version\": \"1.0.0\"}", 0o644},
		".config/docker/daemon.json":                           {"{\n\t\"storage-driver\": \"overlay2\"\n}", 0o600},
		".config/systemd/user/docker.service":                  {"[Service]\nExecStart=/bin/true\n", 0o644},
		".local/lib/docker/plugins/other.spec":                 {"unix:///other.sock", 0o644},
		"bin/rootless-ovl":                                     {"", 0o755},
		"bin/rootless-ovl-plugin":                              {"", 0o755},
		".local/state/rootless-ovl/node-id":                    {"0123", 0o600},
	} {
		path = filepath.Join(s.home(), path)
		if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(file.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, file.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, long, long); err != nil {
			t.Fatal(err)
		}
	}
}

// tree is everything below a directory: what it is, its mode, its content or target, and the time of files.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		what := fi.Mode().String()
		switch fi.Mode().Type() {
		case 0:
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += fmt.Sprintf(" %v %q", fi.ModTime(), text)
		case fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " -> " + to
		}
		all[path] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// installed carries out an Install.
func installed(t *testing.T, s Setup, parts ...Part) Plan {
	t.Helper()
	p, err := s.Install(whole, parts)
	if err != nil {
		t.Fatal(err)
	}
	if err := Apply(p, func(Change) {}); err != nil {
		t.Fatal(err)
	}
	return p
}

func uninstalled(t *testing.T, s Setup, parts ...Part) Plan {
	t.Helper()
	p, err := s.Uninstall(whole, parts)
	if err != nil {
		t.Fatal(err)
	}
	if err := Apply(p, func(Change) {}); err != nil {
		t.Fatal(err)
	}
	return p
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestUninstall_LeavesTheHomeAsItWas(t *testing.T) {
	for _, podman := range []string{"podman version 4.3.1", "podman version 5.4.0", ""} {
		for _, furnished := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s furnished %t", podman, furnished), func(t *testing.T) {
				s := homeOf(t, podman)
				if furnished {
					furnish(t, s)
				}
				before := tree(t, s.home())
				parts := slices.DeleteFunc(slices.Clone(Parts), func(p Part) bool { return p == Netavark && !s.podmanAtLeast(4, 6) })
				installed(t, s, parts...)
				after := tree(t, s.home())
				for path, what := range before {
					if after[path] != what {
						t.Errorf("install changed %s: %s, it was %s", path, after[path], what)
					}
				}
				if len(after) < len(before)+15 {
					t.Errorf("only %d things came to the %d that there were", len(after)-len(before), len(before))
				}
				if p, err := s.Install(whole, parts); err != nil || !p.Empty() {
					t.Errorf("installing again would do %+v, %v", p.Changes, err)
				}
				uninstalled(t, s)
				if diff := cmp.Diff(before, tree(t, s.home())); diff != "" {
					t.Errorf("the home is not as it was:\n%s", diff)
				}
				if p, err := s.Uninstall(whole, nil); err != nil || !p.Empty() {
					t.Errorf("uninstalling again would do %+v, %v", p.Changes, err)
				}
			})
		}
	}
}

func TestUninstall_TakesPartsBackOneByOne(t *testing.T) {
	s := homeOf(t, "podman version 5.4.0")
	furnish(t, s)
	before := tree(t, s.home())
	installed(t, s, Podman)
	withPodman := tree(t, s.home())
	for _, p := range Parts[1:] {
		installed(t, s, p)
	}
	for _, p := range Parts[1:] {
		if !strings.Contains(read(t, s.DropInPath()), s.HooksDir()) {
			t.Errorf("before %s was taken back the hook was not there any more", p)
		}
		uninstalled(t, s, p)
	}
	names := func(tree map[string]string) []string { return slices.Sorted(maps.Keys(tree)) }
	if diff := cmp.Diff(names(withPodman), names(tree(t, s.home()))); diff != "" {
		t.Errorf("with podman alone again:\n%s", diff)
	}
	uninstalled(t, s, Podman)
	if diff := cmp.Diff(before, tree(t, s.home())); diff != "" {
		t.Errorf("the home is not as it was:\n%s", diff)
	}
}

// TestUninstall_FollowsAnInstallThatWasInterrupted stops after each step, of a first install and of one that changes files.
func TestUninstall_FollowsAnInstallThatWasInterrupted(t *testing.T) {
	steps := -1
	for stop := 0; stop != steps; stop++ {
		s := homeOf(t, "podman version 4.3.1")
		furnish(t, s)
		before := tree(t, s.home())
		for _, program := range []string{s.Program, s.Program + "2"} {
			s.Program, s.Plugin = program, program+"-plugin"
			p, err := s.Install(whole, []Part{Podman, Docker, CNI, Systemd})
			if err != nil {
				t.Fatalf("after %d steps: %v", stop, err)
			}
			steps = max(steps, len(p.Changes)+1)
			p.Changes = p.Changes[:min(stop, len(p.Changes))]
			if err := Apply(p, func(Change) {}); err != nil {
				t.Fatal(err)
			}
		}
		if p := uninstalled(t, s); len(p.Kept) > 0 {
			t.Errorf("after %d steps these stay: %v", stop, p.Kept)
		}
		if diff := cmp.Diff(before, tree(t, s.home())); diff != "" {
			t.Fatalf("after %d steps the home is not as it was:\n%s", stop, diff)
		}
	}
}

func TestInstall_RefusesWhatItDidNotWrite(t *testing.T) {
	tests := []struct {
		name   string
		before func(s Setup) error // of the refused install
		says   []string
	}{
		{"a file of the user's", func(s Setup) error {
			return writeIn(s.HookPath(), "{}")
		}, []string{".json is there and was not written by rootless-ovl install", "mv "}},
		{"a link of the user's", func(s Setup) error {
			if err := os.MkdirAll(filepath.Dir(s.UnitPath("service")), 0o755); err != nil {
				return err
			}
			return os.Symlink("/dev/null", s.UnitPath("service"))
		}, []string{"rootless-ovl.service is there", "mv "}},
		{"two at once", func(s Setup) error {
			if err := writeIn(s.HookPath(), "{}"); err != nil {
				return err
			}
			return writeIn(s.ConflistPath(), "{}")
		}, []string{".json is there", ".conflist is there"}},
		{"a file of ours that was changed", func(s Setup) error {
			p, err := s.Install(whole, []Part{Podman})
			if err != nil {
				return err
			}
			if err := Apply(p, func(Change) {}); err != nil {
				return err
			}
			return writeIn(s.HookPath(), "{} ")
		}, []string{"was changed since it was installed", "mv "}},
		{"a file where a directory should be", func(s Setup) error {
			return writeIn(filepath.Dir(s.HooksDir()), "")
		}, []string{"not a directory", "mv "}},
		{"a file two above", func(s Setup) error {
			return writeIn(filepath.Dir(filepath.Dir(s.ConflistPath())), "")
		}, []string{"/cni is in the way", "mv "}},
		{"a later list of the user's", func(s Setup) error {
			return writeIn(filepath.Join(filepath.Dir(s.DropInPath()), "99-mine.conf"), "[engine]\nhooks_dir=[\"/x\"]\n")
		}, []string{"99-mine.conf", "add \""}},
		{"no TOML", func(s Setup) error {
			return writeIn(filepath.Join(s.ConfigHome, "containers", "containers.conf"), "[engine\n")
		}, []string{"containers.conf is not TOML", "mend it", "line 2"}},
		{"a record of another program", func(s Setup) error {
			return writeIn(recordPath(s.StateDir), `{"version": 99}`)
		}, []string{"version 99", "use the rootless-ovl that wrote it"}},
		{"a record that is none", func(s Setup) error {
			return writeIn(recordPath(s.StateDir), `{`)
		}, []string{"install.json", "backup"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := homeOf(t, "podman version 4.3.1")
			furnish(t, s)
			if err := tt.before(s); err != nil {
				t.Fatal(err)
			}
			_, err := s.Install(whole, []Part{Podman, CNI, Systemd})
			if err == nil {
				t.Fatal("nothing was refused")
			}
			for _, say := range tt.says {
				if !strings.Contains(err.Error(), say) {
					t.Errorf("%v, want %q", err, say)
				}
			}
		})
	}
}

func TestErrors_OfWhatTheUserWroteAreNotOurFault(t *testing.T) {
	s := homeOf(t, "podman version 4.3.1")
	if err := writeIn(filepath.Join(s.ConfigHome, "containers", "containers.conf"), "[engine\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Install(whole, []Part{Podman}); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("no TOML: %v", err)
	}
	if err := writeIn(s.HookPath(), "{}"); err != nil {
		t.Fatal(err)
	}
	s.ConfigHome = filepath.Join(s.home(), "empty")
	if err := writeIn(s.HookPath(), "{}"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Install(whole, []Part{Podman}); !errors.Is(err, api.ErrInUse) {
		t.Errorf("a file in the way: %v", err)
	}
	if err := writeIn(recordPath(s.StateDir), "{"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Uninstall(whole, nil); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a record that is none: %v", err)
	}
}

func TestUninstall_TellsOfFilesWhoseRecordIsLost(t *testing.T) {
	s := homeOf(t, "podman version 4.3.1")
	installed(t, s, Podman, Systemd)
	if err := os.Remove(recordPath(s.StateDir)); err != nil {
		t.Fatal(err)
	}
	p, err := s.Uninstall(whole, nil)
	if err != nil || !p.Empty() {
		t.Fatalf("%v, %v", p.Changes, err)
	}
	notes := strings.Join(p.Notes, "\n")
	for _, want := range []string{recordPath(s.StateDir), s.HookPath(), s.UnitPath("service"), s.DropInPath(), "--state-dir"} {
		if !strings.Contains(notes, want) {
			t.Errorf("%q is not in %q", want, notes)
		}
	}
}

func writeIn(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

func TestInstall_LeavesWhatIsAsWantedToItsOwner(t *testing.T) {
	s := homeOf(t, "")
	if err := writeIn(s.DockerSpecPath(), string(s.wantedFor([]Part{Docker})[0].content)); err != nil {
		t.Fatal(err)
	}
	before := tree(t, s.home())
	p := installed(t, s, Docker)
	if len(p.Changes) != 0 || !slices.Equal(p.Foreign, []string{s.DockerSpecPath()}) {
		t.Errorf("%+v", p)
	}
	uninstalled(t, s)
	if diff := cmp.Diff(before, tree(t, s.home())); diff != "" {
		t.Error(diff)
	}
}

func TestUninstall_LeavesWhatWasChangedOrAdded(t *testing.T) {
	s := homeOf(t, "podman version 4.3.1")
	installed(t, s, Podman, Systemd)
	if err := writeIn(s.UpEnvPath(), "ROOTLESS_OVL_UP=--ephemeral\n"); err != nil {
		t.Fatal(err)
	}
	if err := writeIn(s.HookPath(), "{}"); err != nil {
		t.Fatal(err)
	}
	neighbour := filepath.Join(filepath.Dir(s.UnitPath("service")), "mine.service")
	if err := writeIn(neighbour, ""); err != nil {
		t.Fatal(err)
	}
	s2 := s
	s2.Program += "2"
	if _, err := s2.Install(whole, []Part{Systemd}); err == nil {
		t.Error("the changed hook was not in the way")
	}
	p := uninstalled(t, s)
	slices.Sort(p.Kept)
	if want := []string{s.UpEnvPath(), s.HookPath()}; !slices.Equal(p.Kept, want) {
		t.Errorf("kept %v, want %v", p.Kept, want)
	}
	for _, path := range []string{s.UpEnvPath(), s.HookPath(), neighbour} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(s.StateDir); err == nil {
		t.Error("the state directory, made for the record, is still there")
	}
	if got := read(t, s.UpEnvPath()); got != "ROOTLESS_OVL_UP=--ephemeral\n" {
		t.Errorf("up.env is %q", got)
	}
}

func TestInstall_KeepsTheUsersFlagsOverAnUpgrade(t *testing.T) {
	s := homeOf(t, "")
	installed(t, s, Systemd)
	if err := writeIn(s.UpEnvPath(), "ROOTLESS_OVL_UP=--ephemeral\n"); err != nil {
		t.Fatal(err)
	}
	s.Program = filepath.Join(s.home(), "new bin", "rootless-ovl")
	installed(t, s, Systemd)
	if got := read(t, s.UpEnvPath()); got != "ROOTLESS_OVL_UP=--ephemeral\n" {
		t.Errorf("up.env is %q", got)
	}
	if !strings.Contains(read(t, s.UnitPath("service")), s.Program) {
		t.Error("the unit has the old program")
	}
	if fi, err := os.Stat(s.UpEnvPath()); err != nil || fi.Mode().Perm()&0o077 != 0 && fi.Mode().Perm() != 0o644 {
		t.Errorf("up.env: %v, %v", fi.Mode(), err)
	}
}

// TestInstall_RewritesWhatAVersionWithoutThePluginWrote begins with files of one, which started rootless-ovl itself, and their record.
func TestInstall_RewritesWhatAVersionWithoutThePluginWrote(t *testing.T) {
	s := homeOf(t, "podman version 5.4.0")
	furnish(t, s)
	before := tree(t, s.home())
	installed(t, s, Podman, CNI, Netavark, Systemd)
	old := map[string]string{} // by path
	for _, path := range []string{s.HookPath(), filepath.Join(s.cniDir(), name), filepath.Join(s.netavarkDir(), name)} {
		now := read(t, path)
		then := strings.NewReplacer(PluginName, name, `\"$1\" oci-hook`, `\"$1\" plugin oci-hook`, "' cni ", "' plugin cni ", "' netavark ", "' plugin netavark ").Replace(now)
		if then == now || !strings.Contains(then, " plugin ") {
			t.Fatalf("%s does not start the plugin: %s", path, now)
		}
		old[path] = then
		if err := writeIn(path, then); err != nil {
			t.Fatal(err)
		}
		record := strings.ReplaceAll(read(t, recordPath(s.StateDir)), hashOf([]byte(now)), hashOf([]byte(then)))
		record = strings.Replace(record, fmt.Sprintf("  \"plugin\": %q,\n", s.Plugin), "", 1)
		if err := writeIn(recordPath(s.StateDir), record); err != nil {
			t.Fatal(err)
		}
	}
	if rec, err := ReadRecord(whole, s.StateDir); err != nil || rec.Plugin != "" || !rec.StartsPlugin() {
		t.Fatalf("%+v, %v", rec, err)
	}
	if p := installed(t, s, Podman); len(p.Kept) > 0 {
		t.Errorf("these stay: %v", p.Kept)
	}
	for path := range old {
		if text := read(t, path); !strings.Contains(text, s.Plugin) || strings.Contains(text, " plugin ") {
			t.Errorf("%s is\n%s", path, text)
		}
	}
	if rec, err := ReadRecord(whole, s.StateDir); err != nil || rec.Plugin != s.Plugin {
		t.Errorf("%+v, %v", rec, err)
	}
	uninstalled(t, s)
	if diff := cmp.Diff(before, tree(t, s.home())); diff != "" {
		t.Errorf("the home is not as it was:\n%s", diff)
	}
}

func TestInstall_WantsThePluginForEnginesThatStartIt(t *testing.T) {
	for _, tt := range []struct {
		parts []Part
		wants bool
	}{{[]Part{Podman}, true}, {[]Part{CNI}, true}, {[]Part{Docker, Netavark}, true}, {[]Part{Docker, Systemd, Shell}, false}} {
		s := homeOf(t, "podman version 5.4.0")
		s.Plugin = ""
		_, err := s.Install(whole, tt.parts)
		if (err != nil) != tt.wants {
			t.Errorf("%v: %v", tt.parts, err)
		}
		if err != nil && (!strings.Contains(err.Error(), PluginName) || !strings.Contains(err.Error(), filepath.Dir(s.Program))) {
			t.Errorf("%v: %v", tt.parts, err)
		}
	}
	s := homeOf(t, "podman version 5.4.0")
	installed(t, s, Podman, Docker)
	uninstalled(t, s, Podman)
	if rec, err := ReadRecord(whole, s.StateDir); err != nil || rec.Plugin != "" {
		t.Errorf("docker alone: %+v, %v", rec, err)
	}
}

func TestInstall_KeepsEveryContainerUntilItIsSaid(t *testing.T) {
	s := homeOf(t, "podman version 4.3.1")
	yes, no := true, false
	s.EveryContainer = &yes
	installed(t, s, Podman)
	s.EveryContainer = nil
	installed(t, s, Podman, Docker)
	if hook := read(t, s.HookPath()); !strings.Contains(hook, `"always": true`) {
		t.Errorf("after another installation: %s", hook)
	}
	uninstalled(t, s, Podman)
	installed(t, s, Podman)
	if hook := read(t, s.HookPath()); strings.Contains(hook, "always") {
		t.Errorf("after it was taken back: %s", hook)
	}
	s.EveryContainer = &yes
	installed(t, s, Podman)
	s.EveryContainer = &no
	installed(t, s, Podman)
	if hook := read(t, s.HookPath()); strings.Contains(hook, "always") || !strings.Contains(hook, "annotations") {
		t.Errorf("after it was said: %s", hook)
	}
}

func TestInstall_RefusesPathsThatFilesCannotHold(t *testing.T) {
	for _, change := range []func(*Setup){
		func(s *Setup) { s.Program = "rootless-ovl" },
		func(s *Setup) { s.Plugin = PluginName },
		func(s *Setup) { s.RuntimeDir = "/run/\nx" },
		func(s *Setup) { s.ConfigHome = ".config" },
		func(s *Setup) { s.DataHome = "/a\xff" },
	} {
		s := homeOf(t, "")
		change(&s)
		if _, err := s.Install(whole, []Part{Docker}); err == nil || !strings.Contains(err.Error(), "absolute path") {
			t.Errorf("%+v: %v", s, err)
		}
	}
}

func TestInstall_RefusesNetavarkOfAnOldPodman(t *testing.T) {
	s := homeOf(t, "podman version 4.3.1")
	if _, err := s.Install(whole, []Part{Netavark}); err == nil || !strings.Contains(err.Error(), "podman 4.6") {
		t.Errorf("%v", err)
	}
	s.PodmanVersion = "podman version 4.6.0-rc1"
	if _, err := s.Install(whole, []Part{Netavark}); err != nil {
		t.Error(err)
	}
}

func TestFound_IsWhatTheMachineHas(t *testing.T) {
	s := homeOf(t, "podman version 4.9.0")
	onPath := map[string]bool{"dockerd": true}
	if got := s.Found(whole, func(p string) bool { return onPath[p] }); !slices.Equal(got, []Part{Podman, Docker, Netavark, Systemd, Shell}) {
		t.Errorf("%v", got)
	}
	if err := writeIn(filepath.Join(filepath.Dir(s.ConflistPath()), "10-other.conflist"), ""); err != nil {
		t.Fatal(err)
	}
	s.PodmanVersion, s.SystemdRuns, s.Completions, s.ManPages = "", false, nil, nil
	if got := s.Found(whole, func(string) bool { return false }); !slices.Equal(got, []Part{CNI}) {
		t.Errorf("%v", got)
	}
}

func TestPlan_ShowsDiffs(t *testing.T) {
	s := homeOf(t, "podman version 4.3.1")
	p, err := s.Install(whole, []Part{Docker, Shell})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := p.Show(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"mkdir " + s.LibHome, "write " + s.DockerSpecPath() + " (mode 0644", "--- /dev/null\n+++ " + s.DockerSpecPath(), "+unix://" + s.RuntimeDir + "/docker.sock\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, &b)
		}
	}
	if strings.Contains(b.String(), "+#compdef") {
		t.Errorf("completions are shown:\n%s", &b)
	}
	installed(t, s, Docker)
	s.RuntimeDir = "/other"
	if p, err = s.Install(whole, []Part{Docker}); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	if err := p.Show(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "--- "+s.DockerSpecPath()) || !strings.Contains(b.String(), "-unix://") || !strings.Contains(b.String(), "+unix:///other/docker.sock") {
		t.Errorf("got\n%s", &b)
	}
}

func TestScripts_StartTheProgramWithItsArguments(t *testing.T) {
	s := homeOf(t, "")
	s.Plugin = filepath.Join(s.home(), `it's "odd" $HOME`, PluginName)
	if err := writeIn(s.Plugin, "#!/bin/sh\nprintf '<%s>' \"$@\"\n"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.Plugin, 0o755); err != nil {
		t.Fatal(err)
	}
	s.RuntimeDir = "/run/$(id)'"
	installed(t, s, CNI)
	out, err := exec.Command(filepath.Join(s.cniDir(), name), "a b").CombinedOutput()
	if want := "<--runtime-dir></run/$(id)'><cni><a b>"; err != nil || string(out) != want {
		t.Errorf("%s, %v; want %s", out, err, want)
	}
}

func TestHook_IsWhatPodmanReads(t *testing.T) {
	s := homeOf(t, "podman version 4.3.1")
	s.Plugin, s.RuntimeDir = "/usr/bin/rootless-ovl-plugin", "/run/user/1000/rootless-ovl"
	want := `{
  "version": "1.0.0",
  "hook": {
    "path": "/bin/sh",
    "args": [
      "sh",
      "-c",
      "START",
      "/usr/bin/rootless-ovl-plugin",
      "/run/user/1000/rootless-ovl"
    ],
    "timeout": 30
  },
  "when": {
    "annotations": {
      "^run\\.rootless-ovl\\.": ".*"
    }
  },
  "stages": [
    "createRuntime",
    "poststop"
  ]
}
`
	start := regexp.MustCompile(`"\[ -x [^\n]*exit 1"`) // what runs the program, which is ocihook's
	if diff := cmp.Diff(want, start.ReplaceAllString(string(s.hook()), `"START"`)); diff != "" {
		t.Error(diff)
	}
	for _, version := range []string{"podman version 4.6.0", "podman version 5.4.2", "podman, somehow"} {
		s.PodmanVersion = version
		if got, want := start.ReplaceAllString(string(s.hook()), `"START"`), strings.Replace(want, `    "poststop"`, `    "poststart",`+"\n"+`    "poststop"`, 1); got != want {
			t.Errorf("%s: %s", version, cmp.Diff(want, got))
		}
	}
}

// TestUnits_AreWhatSystemdReads has systemd itself read them, of a home with any characters in its path.
func TestUnits_AreWhatSystemdReads(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	for _, home := range []string{"my bin 100%", "%h", "$HOME ${HOME} $$", `say "hi"`, "it's", `a\b\x20c`, "; #", "[x]*?", "-@+!|"} {
		t.Run(home, func(t *testing.T) {
			s := homeIn(filepath.Join(t.TempDir(), home), "")
			if err := writeIn(s.Program, "#!/bin/sh\n"); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(s.Program, 0o755); err != nil {
				t.Fatal(err)
			}
			installed(t, s, Systemd)
			if err := os.Mkdir(filepath.Join(s.home(), "run"), 0o700); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(analyze, "verify", "--user", "--man=no", "--recursive-errors=no", s.UnitPath("service"), s.UnitPath("socket"))
			cmd.Env = append(os.Environ(), "HOME="+s.home(), "XDG_RUNTIME_DIR="+filepath.Join(s.home(), "run"), "XDG_CONFIG_HOME="+s.ConfigHome)
			if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
				t.Errorf("%v\n%s\n%s", err, out, read(t, s.UnitPath("service")))
			}
		})
	}
}

// systemd checks a command line without running it, and does not look for the file of the environment.
func TestUnits_QuoteWhatMeansSomethingToSystemd(t *testing.T) {
	s := homeIn(`/home/it's "100%" $me\[1]*?`, "")
	for _, want := range []string{
		`
EnvironmentFile=-/home/it's "100%%" $me\\\[1]\*\?/.config/rootless-ovl/up.env
`,
		`
ExecStart=/bin/sh -c 'exec "$$0" "$$@"' "/home/it's \"100%%\" $$me\\[1]*?/bin/rootless-ovl" --runtime-dir "/home/it's \"100%%\" $$me\\[1]*?/run/rootless-ovl" --state-dir`,
	} {
		if !strings.Contains(string(s.service()), want) {
			t.Errorf("no %q in\n%s", want, s.service())
		}
	}
	if want := "\nListenStream=/home/it's \"100%%\" $me\\[1]*?/run/rootless-ovl/api.sock\n"; !strings.Contains(string(s.socket()), want) {
		t.Errorf("no %q in\n%s", want, s.socket())
	}
	s = homeIn("/home/$me 100%", "") // of a program's own path systemd replaces no variables
	if want := "\nExecStart=\"/home/$me 100%%/bin/rootless-ovl\" --runtime-dir \"/home/$$me 100%%/run/rootless-ovl\""; !strings.Contains(string(s.service()), want) {
		t.Errorf("no %q in\n%s", want, s.service())
	}
}
