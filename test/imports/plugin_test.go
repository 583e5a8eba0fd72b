package imports

import (
	"os/exec"
	"strings"
	"testing"
)

// heavy is what the engines' program must never hold, not even by way of another package: it is started at each start and end of a container,
// and what these packages do before main begins takes longer than all that it has to do.
var heavy = []string{
	"go.etcd.io/", "google.golang.org/", "gvisor.dev/", "github.com/spf13/", "github.com/prometheus/", "github.com/vishvananda/", "go.opentelemetry.io/", "go.uber.org/",
}

// light are the rooms of which it is made.
var light = []string{"api", "engine/cni", "engine/netavark", "engine/ocihook", "cmd/rootless-ovl-plugin"}

func TestPluginStaysThin(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", module+"/cmd/rootless-ovl-plugin").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for dep := range strings.FieldsSeq(string(out)) {
		for _, h := range heavy {
			if strings.HasPrefix(dep, h) {
				t.Errorf("rootless-ovl-plugin holds %s: `go list -deps` tells by whom; it is on the way of every container's start", dep)
			}
		}
		if inner, ours := strings.CutPrefix(dep, module+"/"); ours {
			seen++
			is := false
			for _, l := range light {
				is = is || inner == l
			}
			if !is {
				t.Errorf("rootless-ovl-plugin holds %s: it is made of %s alone, for it is on the way of every container's start", inner, strings.Join(light, ", "))
			}
		}
	}
	if seen != len(light) {
		t.Errorf("looked at %d packages of ours, want %d", seen, len(light))
	}
}
