// oci-hook: as a runtime runs it.

package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestOCIHook_DetachesAtPoststop(t *testing.T) {
	b := newBench(t)
	f := &fakeDaemon{attachments: []api.Attachment{{Name: "web", Owner: "oci/3f1c"}, {Name: "db", Owner: "oci/77aa"}}}
	b.serve(f)
	status := b.run(`{"id": "3f1c", "status": "stopped", "bundle": "/b", "annotations": {"run.rootless-ovl.attach": "web"}}`, "oci-hook")
	if status != 0 || b.out.Len() > 0 {
		t.Errorf("exit status %d, %s; standard output is the engine's: %q", status, &b.err, &b.out)
	}
	if got := f.noted(); !slices.Equal(got, []string{"detach web"}) {
		t.Errorf("the daemon was asked for %v", got)
	}
}

func TestOCIHook_SaysWhatIsWrongOnStandardErrorAlone(t *testing.T) {
	b := newBench(t)
	if status := b.run("nothing of the kind", "oci-hook"); status != exitFailed || b.out.Len() > 0 || !strings.Contains(b.err.String(), "rootless-ovl attach") {
		t.Errorf("exit status %d, %q, %q", status, &b.out, &b.err)
	}
}
