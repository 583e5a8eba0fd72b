// This file makes the file by which an engine finds this hook.

package ocihook

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"regexp"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// FileName is what the hook's file is called in a directory of hooks.
const FileName = "rootless-ovl.json"

// Timeout is after how many seconds the engine ends a hook; the hook itself gives up before, and says why.
const Timeout = 30

// hookFile is podman's schema 1.0.0 (oci-hooks(5)).
type hookFile struct {
	Version string   `json:"version"`
	Hook    hookExec `json:"hook"`
	When    hookWhen `json:"when"`
	Stages  []string `json:"stages"`
}

type hookExec struct {
	Path    string   `json:"path"`
	Args    []string `json:"args"`
	Timeout int      `json:"timeout"`
}

type hookWhen struct {
	Always      bool              `json:"always,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"` // regular expressions of keys and values
}

// start runs the program that is its $0 with the runtime directory $1. The engine's hook is the shell and not the program, because podman
// passes over a hook whose path is not there: after a move of the program a container would start without what its annotations close. What the
// shell prints reaches nobody under crun, so it puts the error where Hook's tellEngine does.
const start = `[ -x "$0" ] && exec "$0" --runtime-dir "$1" oci-hook
text="rootless-ovl-plugin has moved: run 'rootless-ovl install podman' with the program that is there now"
echo "$text" >&2
log=$(tr '\000' '\n' </proc/$PPID/cmdline | sed -n '/^--log$/{n;p;q;}; s/^--log=//p')
[ -f "$log" ] && printf '{"msg":"%s","level":"error"}\n' "$text" >"$log.rootless-ovl" && mv "$log.rootless-ovl" "$log"
exit 1`

// File is the content of the hook's file: program is the absolute path of rootless-ovl-plugin, runtimeDir the daemon's runtime directory, which is always
// named because a hook has no environment at poststop. The hook is for containers that have an annotation of ours, or for every
// container; with late for an engine that may write a container's resolv.conf after createRuntime, too. Errors have api.CodeInvalid.
func File(program, runtimeDir string, every, late bool) ([]byte, error) {
	for _, p := range []string{program, runtimeDir} {
		if !filepath.IsAbs(p) {
			return nil, api.Errorf(api.CodeInvalid, "%q is not an absolute path: a container engine runs hooks in directories of its own", p)
		}
	}
	when := hookWhen{Annotations: map[string]string{"^" + regexp.QuoteMeta(Prefix): ".*"}}
	if every {
		when = hookWhen{Always: true}
	}
	stages := []string{"createRuntime", "poststop"}
	if late {
		stages = []string{"createRuntime", "poststart", "poststop"}
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	err := enc.Encode(hookFile{
		Version: "1.0.0",
		Hook: hookExec{
			Path:    "/bin/sh",
			Args:    []string{"sh", "-c", start, program, runtimeDir},
			Timeout: Timeout,
		},
		When:   when,
		Stages: stages,
	})
	return b.Bytes(), err
}
