// Tests of noticing changes, on made-up messages and in a real network namespace.

package hostnet

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// message is a netlink message.
func message(kind uint16, data ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, make([]byte, unix.SizeofNlMsghdr-len(b))...)
	return append(b, data...)
}

func TestMatters_IsWhatTheChoiceLooksAt(t *testing.T) {
	route := func(kind uint16, dstLen byte) []byte {
		return message(kind, append([]byte{unix.AF_INET, dstLen}, make([]byte, unix.SizeofRtMsg-2)...)...)
	}
	reach := Options{CanReach: ip("203.0.113.1")}
	for _, tt := range []struct {
		name string
		b    []byte
		o    Options
		want bool
	}{
		{"an address", message(unix.RTM_NEWADDR, make([]byte, unix.SizeofIfAddrmsg)...), Options{}, true},
		{"a link", message(unix.RTM_DELLINK, make([]byte, unix.SizeofIfInfomsg)...), Options{}, true},
		{"a default route", route(unix.RTM_NEWROUTE, 0), Options{}, true},
		{"a default route that goes", route(unix.RTM_DELROUTE, 0), Options{}, true},
		{"another route", route(unix.RTM_NEWROUTE, 24), Options{}, false},
		{"another route that goes", route(unix.RTM_DELROUTE, 24), Options{}, false},
		{"another route where one is asked for", route(unix.RTM_NEWROUTE, 24), reach, true},
		{"a default route after another", append(route(unix.RTM_NEWROUTE, 24), route(unix.RTM_NEWROUTE, 0)...), Options{}, true},
		{"nothing", nil, Options{}, false},
		{"half a message", route(unix.RTM_NEWROUTE, 24)[:20], Options{}, true},
		{"a route without a body", message(unix.RTM_NEWROUTE), Options{}, true},
	} {
		if got := matters(tt.b, tt.o); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func FuzzMatters(f *testing.F) {
	f.Add(message(unix.RTM_NEWROUTE, 2, 24, 0, 0), false)
	f.Add(message(unix.RTM_NEWADDR), true)
	f.Fuzz(func(_ *testing.T, b []byte, reach bool) {
		o := Options{}
		if reach {
			o.CanReach = ip("192.0.2.1")
		}
		matters(b, o)
	})
}

// watchInside changes the namespace's network and says what of it was told.
func watchInside() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	told := make(chan struct{}, 1000)
	ended := make(chan error)
	go func() { ended <- Watch(ctx, Options{}, func() { told <- struct{}{} }) }()
	run := func(args string) {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			fmt.Printf("ip %v: %v: %s\n", args, err, out)
			os.Exit(1)
		}
	}
	change := func(what, args string) {
		for len(told) > 0 {
			<-told
		}
		run(args)
		select {
		case <-told:
			fmt.Println("told of", what)
		case <-ctx.Done():
		}
	}
	select {
	case <-told: // it listens
		fmt.Println("told of the beginning")
	case <-ctx.Done():
	}
	change("a link", "link add up0 type veth peer name far0")
	change("an address", "addr add 192.0.2.10/24 dev up0")
	change("a link that comes up", "link set up0 up")
	change("an IPv6 address", "addr add 2001:db8:7::10/64 dev up0 nodad")
	change("a default route", "route add default via 192.0.2.1")
	change("an address that goes", "addr del 192.0.2.10/24 dev up0")
	cancel()
	if err := <-ended; err != nil {
		fmt.Println(err)
	}
	os.Exit(0)
}

func TestWatch_TellsOfChanges(t *testing.T) {
	out := runInside(t, "watch")
	want := `told of the beginning
told of a link
told of an address
told of a link that comes up
told of an IPv6 address
told of a default route
told of an address that goes
`
	if string(out) != want {
		t.Errorf("got\n%s", out)
	}
}
