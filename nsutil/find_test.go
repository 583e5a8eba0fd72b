// Tests of finding a namespace by its number.

package nsutil

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestFindInode_FindsAProcess(t *testing.T) {
	for _, m := range mappings {
		t.Run(m.name, func(t *testing.T) {
			h := startHolder(t, m)
			inode := open(t, h.pid).Inode()
			path, err := FindInode(inode, "")
			if err != nil {
				t.Fatal(err)
			}
			n, err := OpenPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			if n.Inode() != inode || IsMount(path) {
				t.Errorf("%s is %d, want %d", path, n.Inode(), inode)
			}
			for _, last := range []string{path, "/proc/1073741824/ns/net", "/nonexistent", "/proc/self/ns/net"} {
				if again, err := FindInode(inode, last); err != nil || again != path {
					t.Errorf("after %s: %s, %v, want %s", last, again, err, path)
				}
			}
		})
	}
}

// Nobody is in it any more, but a mount namespace has it, as engines do.
func TestFindInode_FindsAMount(t *testing.T) {
	file := filepath.Join(t.TempDir(), `a b\c`)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-Urnm", "sh", "-c", `mount --bind /proc/self/ns/net "$FILE" && stat -Lc %i "$FILE" && exec unshare -n sh -c 'echo alone && read wait'`)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "FILE=" + file}
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
	end := func() {
		in.Close()
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
	}
	t.Cleanup(end)
	lines := bufio.NewScanner(out)
	lines.Scan()
	inode, err := strconv.ParseUint(lines.Text(), 10, 64)
	if err != nil || !lines.Scan() {
		t.Fatalf("%q, %v", lines.Text(), err)
	}
	path, err := FindInode(inode, "")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("/proc/%d/root%s", cmd.Process.Pid, file); path != want || !IsMount(path) {
		t.Errorf("got %s, a mount: %t; want %s", path, IsMount(path), want)
	}
	n, err := OpenPath(path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := n.Dup()
	if err != nil || again.Inode() != inode {
		t.Fatalf("%v, %v", again, err)
	}
	n.Close()
	if _, err := n.Dup(); !errors.Is(err, ErrGone) {
		t.Errorf("of a closed one: %v", err)
	}
	tap, err := again.CreateTAP(TAPConfig{IfName: "eth0", MTU: 1400, Queues: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tap.Close(), again.Close()); err != nil {
		t.Error(err)
	}
	end()
	if path, err := FindInode(inode, path); !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), fmt.Sprint(inode)) {
		t.Errorf("when it has gone: %s, %v", path, err)
	}
}

// A container names its files as it likes.
func TestFind_FollowsNoLinkOutOfTheRootOfAProcessWhateverItsName(t *testing.T) {
	for _, name := range []string{"plain", "two\nlines"} {
		link := filepath.Join(t.TempDir(), name)
		if err := os.Symlink("/proc/self/ns/net", link); err != nil {
			t.Fatal(err)
		}
		path := fmt.Sprintf("/proc/%d/root%s", os.Getpid(), link)
		if inode, err := InodeAt(path); err == nil || !IsMount(path) {
			t.Errorf("%q: net:[%d], a mount: %t", path, inode, IsMount(path))
		}
	}
}

// counted is a Finder that counts how often it looks at the machine, where it finds what there is.
func counted(age time.Duration, there map[uint64][]int) (*Finder, *int) {
	f, n := NewFinder(age), new(int)
	f.take = func() (*snapshot, error) {
		*n++
		return &snapshot{inside: there, mounts: func() map[uint64][]string { return nil }}, nil
	}
	return f, n
}

func TestFinder_LooksOnceForAllWhoAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, taken := counted(time.Second, nil)
		var asking sync.WaitGroup
		for i := range 100 {
			asking.Go(func() {
				for range 10 {
					if _, err := f.Find(uint64(i+1), ""); !errors.Is(err, ErrGone) {
						t.Errorf("%d: %v", i, err)
					}
					if _, err := f.Processes(); err != nil {
						t.Error(err)
					}
					time.Sleep(500 * time.Millisecond)
				}
			})
		}
		asking.Wait()
		if *taken > 10 { // one at each of the moments
			t.Errorf("in five seconds the machine was looked through %d times", *taken)
		}
	})
}

func TestFinder_FindsWhatHasComeSinceItLooked(t *testing.T) {
	self, err := InodeAt("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		f, taken := counted(time.Second, map[uint64][]int{self: {os.Getpid()}})
		f.last = &snapshot{taken: time.Now(), mounts: func() map[uint64][]string { return nil }}
		time.Sleep(time.Millisecond)
		for range 2 {
			if path, err := f.Find(self, ""); err != nil || path != procNet(os.Getpid()) || *taken != 1 {
				t.Errorf("%s, %v, after %d looks", path, err, *taken)
			}
		}
	})
}

func TestFinder_LooksAgainWhenWhatWasThereHasEnded(t *testing.T) {
	self, err := InodeAt("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		there := map[uint64][]int{self: {1 << 30}}
		f, taken := counted(time.Hour, there)
		if _, err := f.Find(self, ""); !errors.Is(err, ErrGone) || *taken != 2 {
			t.Errorf("%v, after %d looks", err, *taken)
		}
		there[self] = []int{1 << 30, os.Getpid()}
		if path, err := f.Find(self, ""); err != nil || path != procNet(os.Getpid()) || *taken != 2 {
			t.Errorf("%s, %v, after %d looks", path, err, *taken)
		}
	})
}

func TestNsfsMounts_ReadsWhatTheKernelWrites(t *testing.T) {
	const info = `22 27 0:21 / /proc rw,nosuid - proc proc rw
35 27 0:4 net:[4026532345] /run/netns/one rw shared:7 - nsfs nsfs rw
36 27 0:4 net:[4026532346] /run/netns/other rw - nsfs nsfs rw
37 27 0:4 net:[4026532345] /run/a\040b\134c\011 rw master:1 propagate_from:2 - nsfs nsfs rw
38 27 8:1 net:[4026532345] /not/one rw - ext4 /dev/sda1 rw
39 27 0:4 mnt:[4026532345] /run/mnt rw - nsfs nsfs rw
40 27 0:4 net:[4026532345]
41 27 0:4 net:[4026532345] /cut rw`
	got := make(map[uint64][]string)
	for inode, point := range nsfsMounts([]byte(info)) {
		got[inode] = append(got[inode], point)
	}
	if want := map[uint64][]string{4026532345: {"/run/netns/one", "/run/a b\\c\t"}, 4026532346: {"/run/netns/other"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func FuzzNsfsMounts(f *testing.F) {
	f.Add([]byte("35 27 0:4 net:[1] /run/netns/one rw shared:7 - nsfs nsfs rw\n"))
	f.Add([]byte("35 27 0:4 net:[1] \\0 rw - nsfs nsfs\n- nsfs \n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, point := range nsfsMounts(b) {
			if point == "" {
				t.Error("a mount point is empty")
			}
		}
	})
}

func TestBootID_IsThere(t *testing.T) {
	if id, err := BootID(); err != nil || len(id) != 36 {
		t.Errorf("%q, %v", id, err)
	}
}
