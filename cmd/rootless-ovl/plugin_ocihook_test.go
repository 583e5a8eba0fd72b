// Tests of the hook as a runtime runs it.

package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestPluginOCIHook_DetachesAtPoststop(t *testing.T) {
	b := newBench(t).serve()
	b.daemon.attachments = []api.Attachment{{Name: "web", Owner: "oci/3f1c"}, {Name: "db", Owner: "oci/77aa"}}
	b.world.stdin = strings.NewReader(`{"id": "3f1c", "status": "stopped", "bundle": "/b", "annotations": {"run.rootless-ovl.attach": "web"}}`)
	if out := b.must("plugin", "oci-hook"); out != "" {
		t.Errorf("standard output is the engine's: %q", out)
	}
	if got := b.daemon.notes.list; !slices.Equal(got, []string{"detach web"}) {
		t.Errorf("the daemon was asked for %v", got)
	}
}

func TestPluginOCIHook_SaysWhatIsWrongOnStandardErrorAlone(t *testing.T) {
	b := newBench(t)
	for _, args := range [][]string{{"plugin", "oci-hook"}, {"plugin", "oci-hook", "-o", "json"}} {
		b.world.stdin = strings.NewReader("nothing of the kind")
		if code := b.run(args...); code != exitFailed || b.out.String() != "" || !strings.Contains(b.err.String(), "rootless-ovl attach") {
			t.Errorf("%v: exit status %d, %q, %q", args, code, &b.out, &b.err)
		}
	}
	b.checkError(b.run("plugin", "oci-hook", "web"), exitUsage, "standard input", "web")
}
