// This file hands an error to the person who started the container.
//
// runc repeats what a failed hook wrote to standard error. crun closes it, and says no more than the hook's path and exit code. Both write
// their errors to the file of their --log flag, one JSON object a line, from which podman takes its own text. So the hook, run
// by the runtime, puts a file with its own error in that one's place: the runtime goes on with the file that it has open, and podman
// reads ours. Where any of this is not so, nothing is changed, and the engine's text is the runtime's.

package ocihook

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// runtimeLog is the file that a runtime's command line names for its errors in JSON; "" where there is none.
func runtimeLog(argv []string) string {
	value := func(flag string) string {
		for i, a := range argv {
			if v, ok := strings.CutPrefix(a, flag+"="); ok {
				return v
			}
			if a == flag && i+1 < len(argv) {
				return argv[i+1]
			}
		}
		return ""
	}
	name := value("--log")
	if value("--log-format") != "json" || !filepath.IsAbs(name) || !slices.Contains(argv, "create") {
		return ""
	}
	return name
}

// tellEngine puts err where the engine looks for the runtime's error.
func (h *Hook) tellEngine(err error) error {
	b, rerr := os.ReadFile(filepath.Join(h.proc, strconv.Itoa(h.parent), "cmdline"))
	if rerr != nil {
		return fmt.Errorf("the runtime's command line: %w", rerr)
	}
	name := runtimeLog(strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"))
	if name == "" {
		return nil
	}
	if fi, serr := os.Lstat(name); serr != nil || !fi.Mode().IsRegular() {
		return serr
	}
	line, merr := json.Marshal(struct {
		Msg   string    `json:"msg"`
		Level string    `json:"level"`
		Time  time.Time `json:"time"`
	}{"rootless-ovl: " + oneLine(err), "error", time.Now().UTC()})
	if merr != nil {
		return merr
	}
	ours := name + ".rootless-ovl"
	if werr := os.WriteFile(ours, append(line, '\n'), 0o600); werr != nil {
		return fmt.Errorf("the runtime's log: %w", werr)
	}
	if rerr := os.Rename(ours, name); rerr != nil {
		return errors.Join(fmt.Errorf("the runtime's log: %w", rerr), os.Remove(ours))
	}
	return nil
}

// oneLine is the text of err without line breaks, of which engines show one part.
func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}
