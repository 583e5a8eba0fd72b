// This file is the record: what was written, so that it can be told from what the user wrote, and taken back.

package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// recordVersion is changed when an older program could not take back what a newer one has written.
const recordVersion = 1

// Record is what was installed. The zero value is nothing.
type Record struct {
	Version        int      `json:"version"`
	Program        string   `json:"program"`         // that systemd's files start
	Plugin         string   `json:"plugin"`          // that engines' files start; empty: none does
	EveryContainer bool     `json:"every_container"` // of podman's hook
	Files          []Entry  `json:"files"`
	Dirs           []string `json:"dirs"` // that were made for them
}

// Entry is a file or a symbolic link.
type Entry struct {
	Path   string   `json:"path"`
	Parts  []Part   `json:"parts"`            // for which it is
	SHA256 []string `json:"sha256,omitempty"` // of the contents that are ours: the last one, and that before, if writing was interrupted
	Link   string   `json:"link,omitempty"`   // where it leads to
	Once   bool     `json:"once,omitempty"`   // the user may change it
}

// recordPath is where the record is.
func recordPath(stateDir string) string { return filepath.Join(stateDir, "install.json") }

// ReadRecord reads the record of a state directory; the view is of the whole file system. It is the zero value where there is none.
func ReadRecord(view fs.FS, stateDir string) (Record, error) {
	path := recordPath(stateDir)
	text, err := fs.ReadFile(view, viewName(path))
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, nil
	}
	if err != nil {
		return Record{}, err
	}
	r, err := parseRecord(text)
	if err != nil {
		return Record{}, api.Errorf(api.CodeInvalid, "%s, the record of what was installed: %w", path, err)
	}
	return r, nil
}

// parseRecord takes the text of a record, whose paths uninstall will remove.
func parseRecord(text []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(text, &r); err != nil {
		return Record{}, fmt.Errorf("%w: restore it from a backup, or move it away (uninstall then lists the files that look like ours)", err)
	}
	if r.Version != recordVersion {
		return Record{}, fmt.Errorf("it is of version %d, this program knows version %d: use the rootless-ovl that wrote it", r.Version, recordVersion)
	}
	for _, e := range r.Files {
		if !cleanAbs(e.Path) || (e.Link == "") == (len(e.SHA256) == 0) {
			return Record{}, fmt.Errorf("the entry of %q is not one: restore it from a backup", e.Path)
		}
	}
	if !slices.ContainsFunc(r.Dirs, func(d string) bool { return !cleanAbs(d) }) {
		return r, nil
	}
	return Record{}, errors.New("a directory in it is not an absolute path: restore it from a backup")
}

func cleanAbs(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/"
}

// Parts are those that are installed.
func (r Record) Parts() []Part {
	var parts []Part
	for _, p := range Parts {
		if slices.ContainsFunc(r.Files, func(e Entry) bool { return slices.Contains(e.Parts, p) }) {
			parts = append(parts, p)
		}
	}
	return parts
}

// StartsPlugin tells whether an installed part has engines start PluginName. Where it does and Plugin is empty, the files are of a version
// before there was one: they start Program in a way that it does not know any more, until they are written anew.
func (r Record) StartsPlugin() bool { return startsPlugin(r.Parts()) }

// Has tells whether a part is installed.
func (r Record) Has(p Part) bool { return slices.Contains(r.Parts(), p) }

func (r Record) entry(path string) (Entry, bool) {
	i := slices.IndexFunc(r.Files, func(e Entry) bool { return e.Path == path })
	if i < 0 {
		return Entry{}, false
	}
	return r.Files[i], true
}

// Amiss are the files that are not there any more, and those that are not as they were written, but for those that are the user's.
func (r Record) Amiss(view fs.FS) (gone, changed []string) {
	for _, e := range r.Files {
		there, err := look(view, e.Path)
		switch {
		case err != nil || there == nil:
			gone = append(gone, e.Path)
		case !e.owns(*there) && !e.Once:
			changed = append(changed, e.Path)
		}
	}
	return gone, changed
}

// owns tells whether what is there is what was written.
func (e Entry) owns(t thing) bool {
	if e.Link != "" {
		return t.link == e.Link
	}
	return t.regular && slices.Contains(e.SHA256, hashOf(t.content))
}

func hashOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// thing is what is at a path.
type thing struct {
	regular bool
	content []byte // of a regular file
	link    string // of a symbolic link
}

// look gives nil for nothing.
func look(view fs.FS, path string) (*thing, error) {
	fi, err := fs.Lstat(view, viewName(path))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) { // makeDirs says what is in the way
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var t thing
	switch fi.Mode().Type() {
	case 0:
		t.regular = true
		t.content, err = fs.ReadFile(view, viewName(path))
	case fs.ModeSymlink:
		t.link, err = fs.ReadLink(view, viewName(path))
	}
	return &t, err
}

func (t thing) is(w wanted) bool {
	if w.link != "" {
		return t.link == w.link
	}
	return t.regular && bytes.Equal(t.content, w.content)
}

// viewName is a path in an fs.FS of the whole file system.
func viewName(path string) string {
	if path = strings.TrimPrefix(filepath.Clean(path), "/"); path == "" {
		return "."
	}
	return path
}
