// Tests of the message.

package handover

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const limit = 10 * time.Second

type note struct {
	Text  string `json:"text,omitempty"`
	Count int    `json:"count"`
}

func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

func TestSend_WritesTheseBytes(t *testing.T) {
	a, b := pair(t)
	if err := Send(a, note{Count: 7}, nil, limit); err != nil {
		t.Fatal(err)
	}
	a.Close()
	var got bytes.Buffer
	_, _ = got.ReadFrom(b)
	if want := "726f7648" + "00000001" + "0000000b" + hex.EncodeToString([]byte(`{"count":7}`)); hex.EncodeToString(got.Bytes()) != want {
		t.Errorf("%x, want %s", got.Bytes(), want)
	}
}

func TestReceive_GetsDescriptorsOfAnyNumberInOrder(t *testing.T) {
	for _, n := range []int{0, 1, perMessage, perMessage + 1, 3*perMessage + 7} {
		a, b := pair(t)
		var files []*os.File
		var fds []int
		for range n {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			w.Close()
			files, fds = append(files, r), append(fds, int(r.Fd()))
		}
		sent := make(chan error, 1)
		go func() { sent <- Send(a, note{Count: n}, fds, limit) }()
		var v note
		got, err := Receive(b, &v, func() int { return v.Count }, limit)
		if err := errors.Join(err, <-sent); err != nil || len(got) != n {
			t.Fatalf("%d: %d came, %v", n, len(got), err)
		}
		for i, fd := range got {
			var mine, theirs unix.Stat_t
			if unix.Fstat(fd, &theirs) != nil || unix.Fstat(fds[i], &mine) != nil || mine.Ino != theirs.Ino {
				t.Errorf("%d: descriptor %d is another", n, i)
			}
		}
		CloseAll(got)
		for _, f := range files {
			f.Close()
		}
	}
}

func TestReceive_TakesNoneOfWhatIsNotAsAnnounced(t *testing.T) {
	for name, announced := range map[string]int{"more": 3, "fewer": 1, "too many": MaxDescriptors + 1} {
		a, b := pair(t)
		if err := Send(a, note{Count: announced}, []int{0, 1}, limit); err != nil {
			t.Fatal(err)
		}
		a.Close()
		var v note
		if fds, err := Receive(b, &v, func() int { return v.Count }, limit); err == nil || len(fds) > 0 {
			t.Errorf("%s: %v, %v", name, fds, err)
		}
	}
}

func TestRead_TellsOfAnotherVersion(t *testing.T) {
	err := Read(strings.NewReader("rovH\x00\x00\x00\x02\x00\x00\x00\x00"), &note{})
	if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "stop") {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("rovH\x00\x00\x00\x01\x00\x00\x00\x0b{\"count\":7}"))
	f.Add([]byte("rovH\x00\x00\x00\x01\xff\xff\xff\xff"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var v note
		if err := Read(bytes.NewReader(b), &v); err == nil && len(b) < headerLen {
			t.Errorf("%x was read", b)
		}
	})
}
