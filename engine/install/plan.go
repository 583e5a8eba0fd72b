// This file decides what is to be done. It changes nothing.

package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// What a Change does.
const (
	MakeDir   = "mkdir"
	Write     = "write" // a file that is not there, or is ours
	Link      = "link"
	Remove    = "remove"
	RemoveDir = "rmdir" // which we made, and which is empty by then
)

// Change is one step of a Plan.
type Change struct {
	Action string
	Path   string
	Mode   fs.FileMode // of MakeDir and Write
	Target string      // of Link
	Old    []byte      // of Write and Remove; nil where there was nothing
	New    []byte      // of Write
	Bulky  bool        // Old and New are not for reading
}

// Plan is what Apply would do. Its order matters.
type Plan struct {
	Changes []Change
	Foreign []string // files that are as wanted without being ours: they stay what they are
	Kept    []string // of an uninstall: files that the user has changed and that therefore stay
	Notes   []string // what is left for the user to do, each a sentence or a command with its reason

	record     Record
	recordPath string
}

// Empty tells whether there is nothing to do.
func (p Plan) Empty() bool { return len(p.Changes) == 0 }

// Install plans these parts beside those that are installed already. The view is of the whole file system. Its error names every file that is
// in the way.
func (s Setup) Install(view fs.FS, parts []Part) (Plan, error) {
	if err := s.check(); err != nil {
		return Plan{}, err
	}
	if slices.Contains(parts, Netavark) && s.PodmanVersion != "" && !s.HasNetavarkPlugins() {
		return Plan{}, fmt.Errorf("%s has no plugins for netavark, podman 4.6 has: use `rootless-ovl install podman`, or podman's CNI with `rootless-ovl install cni`", s.PodmanVersion)
	}
	rec, err := ReadRecord(view, s.StateDir)
	if err != nil {
		return Plan{}, err
	}
	if s.EveryContainer == nil {
		s.EveryContainer = &rec.EveryContainer
	}
	after := union(rec.Parts(), parts)
	if s.Plugin == "" && startsPlugin(after) {
		return Plan{}, fmt.Errorf("%s, which engines start, is neither in %s nor on PATH: put it there, from where you have rootless-ovl (`make build` and `make release` make both), and install again",
			PluginName, filepath.Dir(s.Program))
	}
	all := s.wantedFor(after)
	drop, err := s.dropIn(view, after)
	if err != nil {
		return Plan{}, err
	}
	if drop != nil {
		all = append(all, *drop)
	}
	p := &planner{view: view, was: rec, plan: Plan{recordPath: recordPath(s.StateDir)}}
	p.plan.record = Record{Version: recordVersion, Program: s.Program, Plugin: s.plugin(after), EveryContainer: s.everyContainer(), Dirs: slices.Clone(rec.Dirs)}
	for _, w := range all {
		if err := p.want(w); err != nil {
			return Plan{}, err
		}
	}
	for _, e := range rec.Files { // what an earlier installation had and this one has not
		if !slices.ContainsFunc(all, func(w wanted) bool { return w.path == e.Path }) {
			if err := p.unwant(e); err != nil {
				return Plan{}, err
			}
		}
	}
	if err := p.refused(); err != nil {
		return Plan{}, err
	}
	if err := p.makeDirs(filepath.Dir(p.plan.recordPath), 0o700); err != nil {
		return Plan{}, err
	}
	if err := p.removeDirs(); err != nil {
		return Plan{}, err
	}
	p.saveRecord()
	p.plan.Notes = s.installNotes(parts)
	return p.plan, nil
}

// Uninstall plans to take back these parts, or everything where there are none.
func (s Setup) Uninstall(view fs.FS, parts []Part) (Plan, error) {
	rec, err := ReadRecord(view, s.StateDir)
	if err != nil {
		return Plan{}, err
	}
	if len(parts) == 0 {
		parts = Parts
	}
	p := &planner{view: view, was: rec, plan: Plan{recordPath: recordPath(s.StateDir)}}
	p.plan.record = rec
	p.plan.record.Files, p.plan.record.Dirs = nil, slices.Clone(rec.Dirs)
	if !startsPlugin(slices.DeleteFunc(rec.Parts(), func(q Part) bool { return slices.Contains(parts, q) })) {
		p.plan.record.Plugin = ""
	}
	if slices.Contains(parts, Podman) {
		p.plan.record.EveryContainer = false
	}
	for _, e := range rec.Files {
		left := slices.DeleteFunc(slices.Clone(e.Parts), func(q Part) bool { return slices.Contains(parts, q) })
		switch {
		case len(left) == len(e.Parts):
			p.plan.record.Files = append(p.plan.record.Files, e)
		case len(left) == 0:
			err = p.unwant(e)
		default: // podman's drop-in, for other parts from now on
			var drop *wanted
			if drop, err = s.dropIn(view, left); err == nil && drop != nil {
				err = p.want(*drop)
			}
		}
		if err != nil {
			return Plan{}, err
		}
	}
	if err := p.refused(); err != nil {
		return Plan{}, err
	}
	if err := p.removeDirs(); err != nil {
		return Plan{}, err
	}
	if rec.Version != 0 {
		p.saveRecord()
	}
	p.plan.Notes = s.uninstallNotes(rec, parts)
	if left := s.unrecorded(view); rec.Version == 0 && len(left) > 0 {
		p.plan.Notes = append(p.plan.Notes, fmt.Sprintf("%s, the record of what was installed, is not there, but these files look like ours: give the --state-dir "+
			"that they were installed with, restore the record from a backup, or remove them: rm %s", recordPath(s.StateDir), strings.Join(left, " ")))
	}
	return p.plan, nil
}

// unrecorded are the files that look as if an installation had written them.
func (s Setup) unrecorded(view fs.FS) (paths []string) {
	if s.check() != nil {
		return nil // it cannot have been installed like this
	}
	if s.Plugin == "" { // it has gone since: most likely from beside the program
		s.Plugin = filepath.Join(filepath.Dir(s.Program), PluginName)
	}
	all := s.wantedFor(Parts)
	if drop, err := s.dropIn(view, Parts); err == nil && drop != nil {
		all = append(all, *drop)
	} else {
		all = append(all, wanted{path: s.DropInPath()})
	}
	for _, w := range all {
		there, err := look(view, w.path)
		if err == nil && there != nil && (there.is(w) || there.regular && bytes.Contains(there.content, []byte(marker))) {
			paths = append(paths, w.path)
		}
	}
	return paths
}

// union keeps the order of Parts.
func union(a, b []Part) []Part {
	return slices.DeleteFunc(slices.Clone(Parts), func(p Part) bool { return !slices.Contains(a, p) && !slices.Contains(b, p) })
}

// planner collects a Plan.
type planner struct {
	view     fs.FS
	was      Record
	plan     Plan
	inTheWay []string // what forbids the plan, with its remedy
}

func (p *planner) refused() error {
	if len(p.inTheWay) == 0 {
		return nil
	}
	return api.Errorf(api.CodeInUse, "%s", strings.Join(p.inTheWay, "; "))
}

// want has a file be there.
func (p *planner) want(w wanted) error {
	there, err := look(p.view, w.path)
	if err != nil {
		return err
	}
	e, known := p.was.entry(w.path)
	ours := known && there != nil && e.owns(*there)
	next := Entry{Path: w.path, Parts: w.parts, Link: w.link, Once: w.once}
	if w.link == "" {
		next.SHA256 = []string{hashOf(w.content)}
	}
	switch {
	case there == nil:
		if err := p.makeDirs(filepath.Dir(w.path), dirMode(w)); err != nil {
			return err
		}
		p.plan.Changes = append(p.plan.Changes, writing(w, nil))
	case there.is(w) && !known:
		p.plan.Foreign = append(p.plan.Foreign, w.path)
		return nil
	case there.is(w):
	case known && w.once:
		next.SHA256 = e.SHA256 // the user's by now, or what an earlier program wrote: both stay
	case ours:
		if w.link == "" {
			next.SHA256 = append(next.SHA256, hashOf(there.content))
		}
		p.plan.Changes = append(p.plan.Changes, writing(w, there.content))
	case known:
		p.inTheWay = append(p.inTheWay, fmt.Sprintf("%s was changed since it was installed: move it away (mv %[1]s %[1]s.mine), install again, and put your changes elsewhere", w.path))
	default:
		p.inTheWay = append(p.inTheWay, fmt.Sprintf("%s is there and was not written by rootless-ovl install: move it away (mv %[1]s %[1]s.mine)", w.path))
	}
	p.plan.record.Files = append(p.plan.record.Files, next)
	return nil
}

// dirMode is that of directories made for a file: what only the user may read is in a directory of the same kind.
func dirMode(w wanted) fs.FileMode {
	if w.link == "" && w.mode&0o077 == 0 {
		return 0o700
	}
	return 0o755
}

func writing(w wanted, old []byte) Change {
	if w.link != "" {
		return Change{Action: Link, Path: w.path, Target: w.link}
	}
	return Change{Action: Write, Path: w.path, Mode: w.mode, Old: old, New: w.content, Bulky: w.bulky}
}

// unwant has a file of ours be gone.
func (p *planner) unwant(e Entry) error {
	there, err := look(p.view, e.Path)
	switch {
	case err != nil:
		return err
	case there == nil:
	case e.owns(*there):
		p.plan.Changes = append(p.plan.Changes, Change{Action: Remove, Path: e.Path, Old: there.content, Target: there.link})
	default:
		p.plan.Kept = append(p.plan.Kept, e.Path)
	}
	return nil
}

// makeDirs has a directory and those above it be there. A symbolic link to a directory is one.
func (p *planner) makeDirs(dir string, mode fs.FileMode) error {
	planned := slices.ContainsFunc(p.plan.Changes, func(c Change) bool { return c.Action == MakeDir && c.Path == dir })
	if planned {
		return nil
	}
	fi, err := fs.Stat(p.view, viewName(dir))
	switch {
	case err == nil && !fi.IsDir():
		return api.Errorf(api.CodeInUse, "%s is in the way: it is not a directory, and one is needed there: move it away (mv %[1]s %[1]s.mine)", dir)
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR): // of ENOTDIR it is said below what is in the way
		return err
	}
	if err := p.makeDirs(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	p.plan.Changes = append(p.plan.Changes, Change{Action: MakeDir, Path: dir, Mode: mode})
	if !slices.Contains(p.plan.record.Dirs, dir) {
		p.plan.record.Dirs = append(p.plan.record.Dirs, dir)
	}
	return nil
}

// removeDirs has those of our directories be gone that hold nothing of anybody then.
func (p *planner) removeDirs() error {
	leaves := func(path string) bool {
		if len(p.plan.record.Files) == 0 && path == p.plan.recordPath {
			return true
		}
		return slices.ContainsFunc(p.plan.Changes, func(c Change) bool {
			return c.Path == path && (c.Action == Remove || c.Action == RemoveDir)
		})
	}
	comes := func(dir string) bool { // something in it
		return slices.ContainsFunc(p.plan.Changes, func(c Change) bool {
			return filepath.Dir(c.Path) == dir && (c.Action == Write || c.Action == Link || c.Action == MakeDir)
		}) || len(p.plan.record.Files) > 0 && filepath.Dir(p.plan.recordPath) == dir
	}
	dirs := slices.Clone(p.plan.record.Dirs)
	slices.SortFunc(dirs, func(a, b string) int { return len(b) - len(a) }) // what is inside is longer
	for _, dir := range dirs {
		if planned := slices.ContainsFunc(p.plan.Changes, func(c Change) bool { return c.Action == MakeDir && c.Path == dir }); planned || comes(dir) {
			continue
		}
		fi, err := fs.Lstat(p.view, viewName(dir))
		if err == nil && fi.IsDir() {
			inside, err := fs.ReadDir(p.view, viewName(dir))
			if err != nil {
				return err
			}
			if slices.ContainsFunc(inside, func(e fs.DirEntry) bool { return !leaves(filepath.Join(dir, e.Name())) }) {
				continue
			}
			p.plan.Changes = append(p.plan.Changes, Change{Action: RemoveDir, Path: dir})
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		p.plan.record.Dirs = slices.DeleteFunc(p.plan.record.Dirs, func(d string) bool { return d == dir })
	}
	return nil
}

// saveRecord puts the record after what is removed and before what is written, so that at every moment it has all that is there.
func (p *planner) saveRecord() {
	var forRecord, removed, rest []Change
	dir := filepath.Dir(p.plan.recordPath)
	for _, c := range p.plan.Changes {
		switch {
		case c.Action == MakeDir && (c.Path == dir || strings.HasPrefix(dir, c.Path+"/")):
			forRecord = append(forRecord, c)
		case c.Action == Remove:
			removed = append(removed, c)
		default:
			rest = append(rest, c)
		}
	}
	record := Change{Action: Write, Path: p.plan.recordPath, Mode: 0o600, New: indented(p.plan.record), Bulky: true}
	if len(p.plan.record.Files) == 0 {
		if p.was.Version == 0 {
			p.plan.Changes = nil // nothing was there, and nothing comes
			return
		}
		record = Change{Action: Remove, Path: p.plan.recordPath, Bulky: true}
	}
	there, err := look(p.view, p.plan.recordPath)
	if err == nil && there != nil && string(there.content) == string(record.New) {
		return
	}
	p.plan.Changes = slices.Concat(forRecord, removed, []Change{record}, rest)
}
