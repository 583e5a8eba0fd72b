// Package imports keeps who may import whom.
package imports

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/rootless-ovl/rootless-ovl"

// rooms says what each room of the program may import of ours, and why. What is not listed is forbidden. "*" is everything.
var rooms = map[string]map[string]string{
	"cmd": {"*": "the command line puts the parts together"},
	"node": {
		"forwarder":        "the node fills the route table and adds ports",
		"stack":            "the node runs the gateway",
		"lease":            "the node holds a lease and turns the others into routes",
		"nsutil":           "the node opens TAPs in namespaces",
		"publish":          "the node publishes ports of its attachments",
		"api":              "the node answers the API",
		"internal/hostnet": "the node chooses its external interface and checks for overlaps",
		"internal/packet":  "the gateway's exit hands packets to the router",
		"internal/tap":     "the node makes a device of each TAP descriptor",
		"internal/relay":   "the node joins clients of its host with containers",

		"internal/handover": "a node takes the place of another with its descriptors",
		"proxy":             "the node runs the proxy and dials for it",
		"internal/nettest":  "fakes for tests",
	},
	"forwarder": {"internal/packet": "the currency", "internal/nettest": "fakes for tests"},
	"stack": {
		"internal/packet":  "the currency",
		"internal/hostnet": "what is denied on this host is denied at every address that it has",
		"internal/nettest": "fakes for tests",
	},
	"internal/tap":     {"internal/packet": "the currency", "internal/nettest": "fakes for tests"},
	"internal/packet":  {},
	"internal/hostnet": {},
	"internal/doctor": {
		"internal/hostnet": "a doctor looks at the host's network",
		"nsutil":           "a doctor tries what an attach does",
		"engine":           "a doctor looks at what was installed for engines",
		"internal/cage":    "a doctor looks at what the kernel has for the daemon's cage",
	},
	"internal/cage": {},
	"internal/opener": {
		"internal/cage": "it shuts itself in",
		"nsutil":        "it answers what nsutil looks for in other processes",
		"api":           "it answers what the API looks for in those that ask",
		"engine":        "it answers what the docker driver looks for in dockerd",
	},
	"internal/nettest": {"internal/packet": "fakes produce and check packets"},
	"internal/relay":   {},

	"internal/handover": {},
	"proxy":             {"internal/relay": "a client and its destination are joined"},
	"lease":             {"internal/relay": "the embedded store's clients are joined with its member where it listens on every address"},
	"nsutil":            {},
	"publish":           {},
	"api":               {},
	"engine":            {"api": "engines are thin clients of the daemon"},
	"test":              {},
	"test/interop": {
		"lease": "held against flannel's own packages: what both read and write in the store",
		"test":  "the lab's hosts, for flannel and our node",
	},
}

// gvisor says which of gVisor's packages a room may import; "" is all of them.
var gvisor = map[string]string{
	"stack":            "",
	"forwarder":        "header checksum",
	"internal/tap":     "header checksum",
	"internal/nettest": "header checksum checker",
}

func TestImportDirections(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	files := 0
	err = filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); file != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(file, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		files++
		room := roomOf(path.Dir(filepath.ToSlash(rel)))
		if room == "" {
			t.Errorf("%s belongs to no room: add its directory to the rooms of this test, with its reasons", rel)
			return nil
		}
		seen[room] = true
		checkFile(t, file, rel, room)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 10 || !seen["cmd"] || !seen["forwarder"] {
		t.Errorf("looked at %d files, in %v: is the root right?", files, seen)
	}
}

func checkFile(t *testing.T, file, rel, room string) {
	t.Helper()
	src, err := os.ReadFile(file)
	if err != nil {
		t.Error(err)
		return
	}
	parsed, err := parser.ParseFile(token.NewFileSet(), file, src, parser.ImportsOnly)
	if err != nil {
		t.Error(err)
		return
	}
	for _, spec := range parsed.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Error(err)
			continue
		}
		if inner, ok := strings.CutPrefix(imported, "gvisor.dev/gvisor/pkg/"); ok {
			allowed, may := gvisor[room]
			last := path.Base(inner)
			if !may || allowed != "" && !strings.Contains(" "+allowed+" ", " "+last+" ") {
				t.Errorf("%s imports %s: gVisor is for stack/ only, its header and checksum packages also for forwarder/ and internal/tap", rel, imported)
			}
			if inner == "tcpip/stack" && (spec.Name == nil || spec.Name.Name != "gstack") {
				t.Errorf("%s imports gVisor's stack without the name gstack", rel)
			}
			continue
		}
		inner, ok := strings.CutPrefix(imported, module+"/")
		if !ok {
			continue
		}
		to := roomOf(inner)
		if to == room { // a room's own packages
			continue
		}
		if rooms[room]["*"] == "" && rooms[room][to] == "" {
			t.Errorf("%s (%s) imports %s (%s), which no rule allows: %s may import %v", rel, room, inner, to, room, rooms[room])
		}
		if to == "cmd" {
			t.Errorf("%s imports %s: nothing imports the command line", rel, inner)
		}
	}
}

// roomOf finds the room that a directory of the module belongs to.
func roomOf(dir string) string {
	for ; dir != "." && dir != "/"; dir = path.Dir(dir) {
		if _, ok := rooms[dir]; ok {
			return dir
		}
	}
	return ""
}
