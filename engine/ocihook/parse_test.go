// Tests of what comes from outside: the state, the configuration, the runtime's command line; and of the hook's own file.

package ocihook

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestReadState_RefusesWhatIsNone(t *testing.T) {
	for text, says := range map[string]string{
		"":                           "rootless-ovl attach",
		"[]":                         "rootless-ovl attach",
		`{"id": 7}`:                  "rootless-ovl attach",
		`{}`:                         "id",
		`{"id": "a/b"}`:              "a/b",
		`{"id": "a", "pid": -1}`:     "-1",
		`{"id": "a", "bundle": "x"}`: "absolute",
		`{"id": "a"}`:                "absolute",
		`{"id": "b"}` + strings.Repeat(" ", maxState): "annotations",
	} {
		_, err := ReadState(strings.NewReader(text))
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%.40q: %v, want an error that says %q", text, err, says)
		}
	}
}

func TestBundle_TellsWhoseTheNetworkIs(t *testing.T) {
	for text, want := range map[string]int{
		`{"linux": {"namespaces": [{"type": "network"}]}}`:                                     0,
		`{"linux": {"namespaces": [{"type": "network", "path": "/run/user/1/netns/x"}]}}`:      0,
		`{"linux": {"namespaces": [{"type": "network", "path": "/proc/4200/ns/net"}]}}`:        4200,
		`{"linux": {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}}`:               0,
		`{"linux": {"namespaces": [{"type": "network", "path": "/proc/99999999999/ns/net"}]}}`: 0,
		`{"linux": {"namespaces": [{"type": "network", "path": "/proc/self/ns/net"}]}}`:        0,
		`{}`: 0,
	} {
		c, err := parseBundle([]byte(text))
		if err != nil || c.holder() != want {
			t.Errorf("%s: %d, %v; want %d", text, c.holder(), err, want)
		}
	}
}

func TestFile_IsForPodman(t *testing.T) {
	for _, every := range []bool{false, true} {
		b, err := File("/home/u/bin/rootless-ovl-plugin", "/run/user/1000/rootless-ovl", every, false)
		if err != nil {
			t.Fatal(err)
		}
		var f hookFile
		if err := json.Unmarshal(b, &f); err != nil {
			t.Fatal(err)
		}
		if f.Version != "1.0.0" || f.Hook.Path != "/bin/sh" || !slices.Equal(f.Stages, []string{"createRuntime", "poststop"}) || f.When.Always != every {
			t.Errorf("%s", b)
		}
		if want := []string{"sh", "-c", start, "/home/u/bin/rootless-ovl-plugin", "/run/user/1000/rootless-ovl"}; !slices.Equal(f.Hook.Args, want) {
			t.Errorf("args %v, want %v", f.Hook.Args, want)
		}
		if every {
			continue
		}
		for key, is := range map[string]bool{"run.rootless-ovl.attach": true, "run.rootless-ovl.publish": true, "run.rootlessXovl.attach": false, "x.run.rootless-ovl.attach": false} {
			matches := false
			for k := range f.When.Annotations {
				matches = matches || regexp.MustCompile(k).MatchString(key)
			}
			if matches != is {
				t.Errorf("annotation %s: the hook is run: %v", key, matches)
			}
		}
	}
	if b, err := File("/bin/rootless-ovl", "/run", false, true); err != nil || !strings.Contains(string(b), `"poststart"`) {
		t.Errorf("for an engine that writes late: %s, %v", b, err)
	}
	for _, paths := range [][2]string{{"rootless-ovl", "/run"}, {"/bin/rootless-ovl", "run"}} {
		if _, err := File(paths[0], paths[1], false, false); err == nil || !strings.Contains(err.Error(), "absolute") {
			t.Errorf("%v: %v", paths, err)
		}
	}
}

// A runtime's hook is a child of the runtime, which here is a shell with a runtime's command line.
func TestFile_StartsTheProgramOrRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "it's here")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program, log := filepath.Join(dir, "rootless-ovl-plugin"), filepath.Join(dir, "oci-log")
	b, err := File(program, "/run/a b", true, false)
	if err != nil {
		t.Fatal(err)
	}
	var f hookFile
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	run := func() (string, error) {
		argv := append([]string{"-c", `"$@"; exit $?`, "crun", f.Hook.Path}, f.Hook.Args[1:]...)
		cmd := exec.Command("/bin/sh", append(argv, "--log-format=json", "--log", log, "create")...)
		cmd.Env = []string{}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, "rootless-ovl install podman") {
		t.Errorf("without the program: %q, %v", out, err)
	}
	told, err := os.ReadFile(log)
	var line struct{ Msg string }
	if err != nil || json.Unmarshal(told, &line) != nil || !strings.Contains(line.Msg, "rootless-ovl-plugin has moved") {
		t.Errorf("the engine is told %q, %v", told, err)
	}
	if err := os.WriteFile(program, []byte("#!/bin/sh\nprintf '%s|' \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := run(); err != nil || out != "--runtime-dir|/run/a b|oci-hook|" {
		t.Errorf("the program is given %q, %v", out, err)
	}
}

func TestNameOf_CanNameAnAttachment(t *testing.T) {
	for _, id := range []string{containerA, "1", "123456789012", "1+1", "web", "_x", strings.Repeat("7", 64), strings.Repeat("a", 200), "+++"} {
		if err := api.CheckName(nameOf(id)); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
}

func FuzzReadState(f *testing.F) {
	f.Add(`{"ociVersion":"1.0","id":"a1","pid":7,"root":"/r","bundle":"/b","status":"created","annotations":{"run.rootless-ovl.attach":"web"}}`)
	f.Add(`{"id":"a1","status":"stopped","annotations":{"run.rootless-ovl.publish":"8080:80,","run.rootless-ovl.host-access":"x"}}`)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ReadState(strings.NewReader(text))
		if err != nil {
			return
		}
		if s.PID < 0 || s.Bundle != "" && !filepath.IsAbs(s.Bundle) {
			t.Errorf("%+v", s)
		}
		w, err := readWish(s.Annotations, s.ID)
		if err != nil {
			return
		}
		w.request.PID, w.request.Owner = 1, Owner(s.ID)
		if err := w.request.Validate(); err != nil {
			t.Errorf("a request that the daemon refuses: %v", err)
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	f.Add(`{"root":{"path":"rootfs"},"mounts":[{"destination":"/etc/resolv.conf","source":"/x"}],"linux":{"namespaces":[{"type":"network","path":"/proc/7/ns/net"}]}}`)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseBundle([]byte(text))
		if err != nil {
			return
		}
		if c.holder() < 0 {
			t.Errorf("holder %d", c.holder())
		}
		c.overResolvConf()
		c.engineMakesNetwork()
	})
}

func FuzzRuntimeLog(f *testing.F) {
	f.Add("crun\x00--log-format=json\x00--log=/x/oci-log\x00create")
	f.Add("crun\x00--log\x00--log")
	f.Fuzz(func(t *testing.T, cmdline string) {
		if name := runtimeLog(strings.Split(cmdline, "\x00")); name != "" && !filepath.IsAbs(name) {
			t.Errorf("%q is not absolute", name)
		}
	})
}
