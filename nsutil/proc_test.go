// Tests of what /proc says about container engines' processes.

package nsutil

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestDetachedNetns_FindsWhatRootlessKitKeepsApart(t *testing.T) {
	h := startHolder(t, mapping{uid: 0, userns: true})
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "netns"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// As RootlessKit's child: in a mount namespace, and the new network namespace bound to a file there.
	script := `mount --bind /proc/self/ns/net "$ROOTLESSKIT_STATE_DIR/netns" && echo ready && read wait`
	child := func(dir, script string) int {
		cmd := exec.Command("unshare", "-Urnm", "sh", "-c", script)
		cmd.Env = []string{"PATH=/usr/bin:/bin", "ROOTLESSKIT_STATE_DIR=" + dir}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatalf("%q, %v", line, err)
		}
		return cmd.Process.Pid
	}
	pid := child(dir, script)
	path := DetachedNetns(pid)
	if want := fmt.Sprintf("/proc/%d/root%s/netns", pid, dir); path != want {
		t.Fatalf("got %q, want %q", path, want)
	}
	n, err := OpenPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if want := open(t, pid).Inode(); n.Inode() != want {
		t.Errorf("namespace %d, want %d", n.Inode(), want)
	}
	for name, pid := range map[string]int{"another process": h.pid, "no netns file": child(t.TempDir(), "echo ready && read wait"), "no process": 1 << 30} {
		if got := DetachedNetns(pid); got != "" {
			t.Errorf("%s: %q", name, got)
		}
	}
}
