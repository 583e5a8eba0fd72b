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
	pid := rootlessKitChild(t, dir, script)
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
	for name, pid := range map[string]int{"another process": h.pid, "no netns file": rootlessKitChild(t, t.TempDir(), "echo ready && read wait"), "no process": 1 << 30} {
		if got := DetachedNetns(pid); got != "" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestDetachedNetns_FollowsNoLinkOutOfTheRootOfTheProcess(t *testing.T) {
	other, h := startHolder(t, mapping{uid: 0, userns: true}), startHolder(t, mapping{uid: 0, userns: true})
	inode := open(t, other.pid).Inode()
	root := t.TempDir()
	for name, to := range map[string]string{
		"absolute": fmt.Sprintf("/proc/%d/ns/net", other.pid),
		"relative": fmt.Sprintf("../../../../../../../../proc/%d/ns/net", other.pid),
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(root, name)
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(to, filepath.Join(dir, "netns")); err != nil {
				t.Fatal(err)
			}
			pid := rootlessKitChild(t, dir, "echo ready && read wait")
			if got := DetachedNetns(pid); got != "" {
				t.Errorf("in the same root: %q", got)
			}
			// Below /proc/PID/root of any process it is for that process to say what there is.
			path := fmt.Sprintf("/proc/%d/root%s/netns", h.pid, dir)
			if n, err := OpenPath(path); err == nil {
				t.Errorf("%s leads to %d, that of the other is %d", path, n.Inode(), inode)
				n.Close()
			}
			if got, err := InodeAt(path); err == nil {
				t.Errorf("%s has inode %d", path, got)
			}
		})
	}
}

// rootlessKitChild starts a process with namespaces and the variable of RootlessKit's child, which ends with the test.
func rootlessKitChild(t *testing.T, dir, script string) int {
	t.Helper()
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
