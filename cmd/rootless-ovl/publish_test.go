// Tests of publish, unpublish and the flags about ports.

package main

import (
	"reflect"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestPublish_AsksForAllAndPrintsWhatWasChosen(t *testing.T) {
	b := newBench(t).serve()
	got := b.must("publish", "8080:80", "[::1]::53/udp", "web", "--snat")
	if want := "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp (snat)\n[::1]:49152->53/udp (snat)\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
	b.must("unpublish", "8080:80", "web")
	b.must("unpublish", "--all", "815")
	if want := "publish web 8080:80 [::1]::53/udp snat true, unpublish web 8080:80 all false, unpublish 815  all true"; b.daemon.notes.String() != want {
		t.Errorf("asked %s\nwant %s", b.daemon.notes, want)
	}
}

func TestPublish_RefusesWhatCannotBeRight(t *testing.T) {
	b := newBench(t).serve()
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"publish"}, "takes ports and at last a name"},
		{[]string{"publish", "web"}, "takes ports and at last a name"},
		{[]string{"publish", "web", "8080:80"}, `"web" cannot be published`},
		{[]string{"publish", "web", "8080:80", "53/udp"}, "the name comes last: `rootless-ovl publish 8080:80 53/udp web`"},
		{[]string{"publish", "815", "8080:80"}, "the name comes last: `rootless-ovl publish 8080:80 815`"},
		{[]string{"unpublish", "web", "8080:80"}, "the name comes last: `rootless-ovl unpublish 8080:80 web`"},
		{[]string{"publish", "8080:80", "../x"}, "neither a name nor a pid"},
		{[]string{"unpublish", "web"}, "takes ports and at last a name"},
		{[]string{"unpublish", "--all"}, "one container"},
		{[]string{"unpublish", "--all", "8080:80", "web"}, "one container"},
		{[]string{"attach", "5", "-p", "x"}, `"x" cannot be published`},
		{[]string{"attach", "5", "-p", "80:80", "--gateway"}, "by their engine"},
		{[]string{"attach", "5", "-p", "80:80", "--no-default-route"}, "--snat"},
		{[]string{"attach", "5", "--snat"}, "none is given"},
		{[]string{"run", "-p", "x", "--", "true"}, `"x" cannot be published`},
	} {
		if code := b.run(tt.args...); code != exitUsage || !strings.Contains(b.err.String(), tt.want) {
			t.Errorf("%v: status %d, %q; want %q", tt.args, code, &b.err, tt.want)
		}
	}
	if b.daemon.notes.String() != "" {
		t.Errorf("the daemon was asked: %s", b.daemon.notes)
	}
}

func TestAttach_PassesPortsOn(t *testing.T) {
	b := newBench(t).serve()
	b.must("attach", "5", "-p", "8080:80", "--publish", "53:53/udp", "--snat")
	want := []api.AttachRequest{{PID: 5, Publish: []string{"8080:80", "53:53/udp"}, SNAT: true}}
	if !reflect.DeepEqual(b.daemon.attached, want) {
		t.Errorf("asked %+v", b.daemon.attached)
	}
}
