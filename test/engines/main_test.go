// The stage of these tests, and what they ask of engines.

package engines

import (
	"archive/tar"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// asked is set by `make engines`: as a part of all tests these would want root and engines of everybody.
const asked = "ROOTLESS_OVL_ENGINES"

func TestMain(m *testing.M) {
	if os.Getenv(asked) == "" {
		fmt.Println("not asked for: make engines, as root")
		return
	}
	os.Exit(lab.RootedMain(m.Run, "README.md"))
}

// busyboxPath is where Debian's busybox-static puts a busybox that runs without libraries.
const busyboxPath = "/bin/busybox"

// bulk is the length in bytes of a file that the containers serve.
const bulk = 8 << 20

var bulkText = strconv.Itoa(bulk)

// nginxCommand has image's serve as nginx does.
const nginxCommand = `CMD ["httpd", "-f", "-p", "0.0.0.0:80", "-h", "/www"]`

// image writes the root of a container for `docker import` into dir.
func image(t *testing.T, dir string) string {
	t.Helper()
	busybox, err := os.ReadFile(busyboxPath)
	if err != nil {
		t.Fatalf("%v: apt-get install busybox-static", err)
	}
	path := filepath.Join(dir, "busybox.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	add(tar.Header{Name: "bin/", Typeflag: tar.TypeDir}, nil)
	add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg}, busybox)
	for _, applet := range []string{"sh", "ping", "wget", "httpd", "ip", "ifconfig", "wc", "timeout", "sleep"} {
		add(tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
	}
	add(tar.Header{Name: "www/", Typeflag: tar.TypeDir}, nil)
	add(tar.Header{Name: "www/bulk", Typeflag: tar.TypeReg}, make([]byte, bulk))
	add(tar.Header{Name: "www/index.html", Typeflag: tar.TypeReg, Mode: 0o644}, []byte(page+"\n"))
	add(tar.Header{Name: "bin/curl", Typeflag: tar.TypeReg}, []byte("#!/bin/sh\nfor url; do :; done\nexec timeout 10 wget -q -O - \"$url\"\n"))
	// What a client's address is to the server.
	add(tar.Header{Name: "www/cgi-bin/", Typeflag: tar.TypeDir}, nil)
	add(tar.Header{Name: "www/cgi-bin/who", Typeflag: tar.TypeReg}, []byte("#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'\nprintf %s \"$REMOTE_ADDR\"\n"))
	for _, dir := range []string{"etc/", "tmp/", "proc/", "sys/", "dev/"} {
		add(tar.Header{Name: dir, Typeflag: tar.TypeDir}, nil)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// program finds a program, or ends the test.
func program(t *testing.T, name, pkg string, more ...string) string {
	t.Helper()
	for _, dir := range append(more, "/usr/bin", "/usr/sbin", "/bin", "/sbin") {
		if path := filepath.Join(dir, name); exec.Command("test", "-x", path).Run() == nil {
			return path
		}
	}
	t.Fatalf("%s is not installed: apt-get install --no-install-recommends %s", name, pkg)
	return ""
}

// ok runs a program on the host, which must succeed, and returns what it printed without its last newline.
func ok(t *testing.T, h *lab.Host, argv ...string) string {
	t.Helper()
	r := h.Run(argv[0], argv[1:]...)
	if r.Code != 0 {
		t.Fatalf("%s: %s: exit code %d\n%s%s", h.Name, strings.Join(argv, " "), r.Code, r.Stdout, r.Stderr)
	}
	return strings.TrimSuffix(r.Stdout, "\n")
}
