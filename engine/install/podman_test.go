// What podman reads, in its order, and what is added to it.

package install

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

// podmanSetup is a Setup whose files are in a made-up file system.
func podmanSetup(version string) Setup {
	return Setup{
		Program: "/usr/bin/rootless-ovl", Plugin: "/usr/bin/rootless-ovl-plugin", RuntimeDir: "/run/user/7/rootless-ovl", StateDir: "/h/.local/state/rootless-ovl",
		ConfigHome: "/h/.config", DataHome: "/h/.local/share", LibHome: "/h/.local/lib", PodmanVersion: "podman version " + version,
	}
}

func files(all map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for path, text := range all {
		m[viewName(path)] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
	}
	return m
}

const (
	userConf = "/h/.config/containers/containers.conf"
	etcConf  = "/etc/containers/containers.conf"
	ourHooks = "/h/.local/share/rootless-ovl/hooks.d"
)

func TestDropIn_AddsToWhatPodmanHas(t *testing.T) {
	tests := []struct {
		name    string
		version string
		files   map[string]string
		parts   []Part
		want    []string // hooks_dir
	}{
		{"nothing there", "4.3.1", nil, []Part{Podman}, []string{ourHooks}},
		{"the user's", "4.3.1", map[string]string{userConf: "[engine]\nhooks_dir=['/a','/b']"}, []Part{Podman}, []string{"/a", "/b", ourHooks}},
		{"the last one counts", "4.3.1", map[string]string{
			"/usr/share/containers/containers.conf": "[engine]\nhooks_dir=['/share']", etcConf: "[engine]\nhooks_dir=['/etc']",
			"/etc/containers/containers.conf.d/a.conf": "[engine]\nhooks_dir=['/etc.d']",
		}, []Part{Podman}, []string{"/etc.d", ourHooks}},
		{"drop-ins of the user's, in order", "4.3.1", map[string]string{
			userConf: "[engine]\nhooks_dir=['/a']", userConf + ".d/20.conf": "[engine]\nhooks_dir=['/20']", userConf + ".d/10.conf": "[engine]\nhooks_dir=['/10']",
			userConf + ".d/30.conf.bak": "[engine]\nhooks_dir=['/30']",
		}, []Part{Podman}, []string{"/20", ourHooks}},
		{"an empty one", "4.3.1", map[string]string{userConf: "[engine]\nhooks_dir=[]"}, []Part{Podman}, []string{ourHooks}},
		{"what is added to", "4.9.0", map[string]string{etcConf: "[engine]\nhooks_dir=['/a']", userConf: "[engine]\nhooks_dir=['/b', {append=true}]"}, []Part{Podman}, []string{"/a", "/b", ourHooks}},
		{"ours already", "4.3.1", map[string]string{userConf: "[engine]\nhooks_dir=['" + ourHooks + "', '/a']"}, []Part{Podman}, []string{"/a", ourHooks}},
		{"other tables", "4.3.1", map[string]string{userConf: "hooks_dir=['/x']\n[containers]\nhooks_dir=['/y']\nengine=1"}, []Part{Podman}, []string{ourHooks}},
		{"our own file does not count", "4.3.1", map[string]string{"/h/.config/containers/containers.conf.d/50-rootless-ovl.conf": "[engine]\nhooks_dir=['/old']"}, []Part{Podman}, []string{ourHooks}},
		{"a later one that adds", "4.9.0", map[string]string{userConf + ".d/90.conf": "[engine]\nhooks_dir=['/z', {append=true}]"}, []Part{Podman}, []string{ourHooks}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := podmanSetup(tt.version)
			w, err := s.dropIn(files(tt.files), tt.parts)
			if err != nil {
				t.Fatal(err)
			}
			conf, err := parseConf(w.content)
			if err != nil {
				t.Fatalf("%v\n%s", err, w.content)
			}
			if got, adds, is := conf.of(lists[0]); !is || adds || !slices.Equal(got, tt.want) {
				t.Errorf("hooks_dir is %v (adds %t), want %v", got, adds, tt.want)
			}
		})
	}
}

func TestDropIn_IsOneFileForAllParts(t *testing.T) {
	s := podmanSetup("4.6.1")
	w, err := s.dropIn(files(map[string]string{userConf: "[network]\ncni_plugin_dirs=['/my cni']"}), []Part{Podman, Docker, CNI, Netavark})
	if err != nil {
		t.Fatal(err)
	}
	want := marker + `
[engine]
hooks_dir = [
  "/h/.local/share/rootless-ovl/hooks.d",
]

[network]
# This list takes the place of those of other files: all but its last line repeats them.
cni_plugin_dirs = [
  "/my cni",
  "/h/.local/share/rootless-ovl/cni",
]
# This list takes the place of those of other files: all but its last line repeats them.
netavark_plugin_dirs = [
  "/usr/local/libexec/netavark",
  "/usr/libexec/netavark",
  "/usr/local/lib/netavark",
  "/usr/lib/netavark",
  "/h/.local/share/rootless-ovl/netavark",
]
`
	if diff := cmp.Diff(want, string(w.content)); diff != "" {
		t.Error(diff)
	}
	if !slices.Equal(w.parts, []Part{Podman, CNI, Netavark}) {
		t.Errorf("it is for %v", w.parts)
	}
	for _, parts := range [][]Part{{Docker, Systemd, Shell}, nil} {
		if w, err := s.dropIn(files(nil), parts); err != nil || w != nil {
			t.Errorf("%v: %+v, %v", parts, w, err)
		}
	}
	s.PodmanVersion = ""
	if w, err := s.dropIn(files(nil), []Part{CNI}); err != nil || w != nil {
		t.Errorf("CNI without podman: %+v, %v", w, err)
	}
}

func TestDropIn_AddsByItselfFromPodman5On(t *testing.T) {
	s := podmanSetup("5.0.0")
	w, err := s.dropIn(files(map[string]string{userConf: "[engine]\nhooks_dir=['/a']"}), []Part{Podman})
	if err != nil {
		t.Fatal(err)
	}
	want := marker + "\n[engine]\nhooks_dir = [\n  \"/h/.local/share/rootless-ovl/hooks.d\",\n  {append=true},\n]\n"
	if string(w.content) != want {
		t.Errorf("got\n%s", w.content)
	}
	conf, err := parseConf(w.content)
	if err != nil {
		t.Fatal(err)
	}
	if dirs, adds, is := conf.of(lists[0]); !is || !adds || len(dirs) != 1 {
		t.Errorf("read back: %v %t %t", dirs, adds, is)
	}
}

func TestKnownToPodman_SeesWhatPodmanSees(t *testing.T) {
	drop := "/h/.config/containers/containers.conf.d/50-rootless-ovl.conf"
	ours := "[engine]\nhooks_dir=['" + ourHooks + "']"
	tests := []struct {
		name   string
		files  map[string]string
		env    string
		known  bool
		hidden []string
	}{
		{"installed", map[string]string{drop: ours}, "", true, nil},
		{"not installed", nil, "", false, nil},
		{"hides what came later", map[string]string{drop: ours, userConf: "[engine]\nhooks_dir=['/new']"}, "", true, []string{"/new"}},
		{"hidden", map[string]string{drop: ours, filepath.Dir(drop) + "/90.conf": "[engine]\nhooks_dir=['/z']"}, "", false, nil},
		{"another file alone", map[string]string{drop: ours, "/my.conf": "[engine]\nhooks_dir=['/z']"}, "/my.conf", false, nil},
		{"another file that has it", map[string]string{"/my.conf": ours}, "/my.conf", true, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := podmanSetup("4.3.1")
			s.ContainersConf = tt.env
			known, hidden, err := s.KnownToPodman(files(tt.files))
			if err != nil || known != tt.known || !slices.Equal(hidden, tt.hidden) {
				t.Errorf("known %t, hidden %v, %v; want %t, %v", known, hidden, err, tt.known, tt.hidden)
			}
		})
	}
}

func TestPodmanAtLeast_ReadsVersions(t *testing.T) {
	for text, want := range map[string]bool{
		"podman version 4.3.1": false, "podman version 4.6.0": true, "podman version 5.0.0-dev": true, "podman version 10.1": true, "podman version 3.9": false,
		"podman version unknown": true, "podman version 99999999999999999999.1": true,
	} {
		if got := (Setup{PodmanVersion: text}).podmanAtLeast(4, 6); got != want {
			t.Errorf("%s: %t", text, got)
		}
	}
}

func FuzzParseConf(f *testing.F) {
	f.Add("[engine]\nhooks_dir = [\"/a\", {append=true}]\n", "/x")
	f.Add("[network]\ncni_plugin_dirs = [1, [2]]\n", "a\"b\\c\x01")
	f.Add("engine = 1", "ü")
	f.Fuzz(func(t *testing.T, text, dir string) {
		if conf, err := parseConf([]byte(text)); err == nil {
			for _, l := range lists {
				conf.of(l)
			}
		}
		if strings.ToValidUTF8(dir, "") != dir {
			return
		}
		conf, err := parseConf([]byte("[engine]\nhooks_dir = [" + tomlString(dir) + "]\n"))
		if err != nil {
			t.Fatalf("%q: %v", dir, err)
		}
		if got, _, _ := conf.of(lists[0]); len(got) != 1 || got[0] != dir {
			t.Errorf("%q became %q", dir, got)
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add(`{"version":1,"files":[{"path":"/a","parts":["podman"],"sha256":["x"]}],"dirs":["/b"]}`)
	f.Add(`{"version":1,"files":[{"path":"../a","link":"/b"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		r, err := parseRecord([]byte(text))
		if err != nil {
			return
		}
		for _, e := range r.Files {
			if !filepath.IsAbs(e.Path) || strings.Contains(e.Path, "/../") {
				t.Errorf("uninstall would remove %q", e.Path)
			}
		}
	})
}
