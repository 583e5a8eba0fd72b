// README.md's snippets for podman, docker and compose, word for word. What they name nginx is a busybox here that serves a page and has a
// curl: no registry is asked.

package engines

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// page is what the stand-in for nginx serves.
const page = "Welcome to nginx!"

// snippets are the fenced blocks of a language below a bold heading of README.md, of which there are so many: none is left out.
func snippets(t *testing.T, heading, language string, count int) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(lab.Repository(), "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(b), "\n**"+heading)
	if !found {
		t.Fatalf("README.md has no **%s**", heading)
	}
	section, _, _ = strings.Cut(section, "\n**")
	var list []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(section, -1) {
		list = append(list, m[1])
	}
	if len(list) != count {
		t.Fatalf("**%s** of README.md has %d blocks of %s, %d are tested", heading, len(list), language, count)
	}
	return list
}

// asCommand puts the program under test where a user has it.
func asCommand(t *testing.T, h *lab.Host) {
	t.Helper()
	err := h.Do(func() error {
		if err := unix.Mount("none", "/usr/local/bin", "tmpfs", 0, "mode=0755"); err != nil {
			return err
		}
		return os.Symlink(h.Binary(), "/usr/local/bin/rootless-ovl")
	})
	if err != nil {
		t.Fatal(err)
	}
}

// script runs one of the user's.
func script(t *testing.T, h *lab.Host, text string) string {
	t.Helper()
	r := h.RunWith(func(c *exec.Cmd) {
		c.Env = append(c.Env, "DOCKER_HOST=unix://"+filepath.Join(h.XDGRuntimeDir(), "docker.sock"))
	}, "/bin/bash", "-ec", text)
	if r.Code != 0 {
		t.Fatalf("%s: exit code %d\n%s%s\nof\n%s", h.Name, r.Code, r.Stdout, r.Stderr, text)
	}
	return strings.TrimSpace(r.Stdout)
}

func TestReadme_Podman(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up()
	asCommand(t, h)
	p := podman(t, h)
	t.Cleanup(func() { h.Run(p, "rm", "-f", "-t", "0", "-a") })
	ok(t, h, p, "import", "--change", nginxCommand, image(t, l.Dir), "docker.io/library/nginx")
	if got := script(t, h, snippets(t, "podman**", "sh", 1)[0]); !strings.HasSuffix(got, page) {
		t.Errorf("printed %q", got)
	}

	t.Run("compose", func(t *testing.T) {
		compose := program(t, "podman-compose", "podman-compose")
		ok(t, h, p, "rm", "-f", "-t", "0", "-a")
		file := filepath.Join(h.Home(), "project", "podman-compose.yml")
		writeAsUser(t, h, file, snippets(t, "compose**", "yaml", 2)[1])
		script(t, h, "cd ~/project && "+compose+" up -d")
		if got := script(t, h, "podman run --rm --network none --annotation run.rootless-ovl.attach=true docker.io/library/nginx curl -s http://web/"); got != page {
			t.Errorf("a container sees %q", got)
		}
	})
}

func TestReadme_Docker(t *testing.T) {
	l := lab.New(t, 1)
	h := l.Host(1)
	h.Up()
	asCommand(t, h)
	d := startDocker(t, h, "dockerd-rootless.sh")
	d.ready()
	t.Cleanup(func() { script(t, h, "docker ps -aq | xargs -r docker rm -f") }) // dockerd would wait for them
	d.ok("import", "--change", nginxCommand, image(t, l.Dir), "nginx")
	if got := script(t, h, snippets(t, "docker**", "sh", 1)[0]); !strings.HasSuffix(got, page) {
		t.Errorf("printed %q", got)
	}

	t.Run("compose", func(t *testing.T) {
		compose := program(t, "docker-compose", "docker-compose")
		d.ok("rm", "-f", "web")
		file := filepath.Join(h.Home(), "project", "docker-compose.yml")
		writeAsUser(t, h, file, snippets(t, "compose**", "yaml", 2)[0])
		script(t, h, "cd ~/project && "+compose+" up -d")
		if got := script(t, h, "docker run --rm --network ovl nginx curl -s http://web/"); got != page {
			t.Errorf("a container sees %q", got)
		}
	})
}
