// docs/operations.md says what the daemon says: every line of its log and every counter of `status`, and no other. What it can say is read
// from the sources, since much of it is said on bad days only.

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// notTheDaemon are the directories whose programs are others: tests, what engines start, what writes files.
var notTheDaemon = []string{"test", "bin", "cmd/rootless-ovl-plugin", "engine/cni", "engine/netavark", "engine/ocihook", "engine/install", "internal/nettest", "lease/leasetest"}

func TestOperations_HasEveryLineOfTheLog(t *testing.T) {
	said := make(map[string]string) // message -> level
	for dir, files := range daemonSources(t) {
		texts := constants(files)
		for _, f := range files {
			ast.Inspect(f, func(x ast.Node) bool {
				call, ok := x.(*ast.CallExpr)
				if !ok {
					return true
				}
				level, message, ok := logged(call)
				if !ok {
					return true
				}
				text, ok := textOf(message, texts)
				if !ok {
					t.Errorf("%s: a message that is no constant: docs/operations.md cannot name it", dir)
					return true
				}
				if level == "debug" {
					return true
				}
				if before := said[text]; before != "" && before != level {
					level = "varies"
				}
				said[text] = level
				return true
			})
		}
	}

	told := make(map[string]string)
	for _, row := range tableRows(section(t, "Log lines")) {
		message := strings.TrimSpace(strings.Trim(row[0], "`"))
		if told[message] != "" {
			t.Errorf("docs/operations.md has %q twice", message)
		}
		told[message] = row[1]
	}
	for _, message := range slices.Sorted(maps.Keys(said)) {
		switch level, ok := told[message]; {
		case !ok:
			t.Errorf("docs/operations.md, Log lines: no row for | `%s` | %s |", message, said[message])
		case said[message] != "varies" && level != said[message]:
			t.Errorf("docs/operations.md calls %q %s, the program %s", message, level, said[message])
		}
		delete(told, message)
	}
	for message := range told {
		t.Errorf("docs/operations.md, Log lines: nothing says %q", message)
	}
}

func TestOperations_HasEveryDropReason(t *testing.T) {
	sources := daemonSources(t)
	counted := make(map[string]bool)
	for dir, before := range map[string]string{"forwarder": "", "internal/tap": "", "stack": "gateway-"} {
		for _, reason := range namesIn(sources[dir]) {
			counted[before+reason] = true
		}
	}
	for name, text := range constants(sources["publish"]) {
		if strings.HasPrefix(name, "drop") {
			counted["publish-"+text] = true
		}
	}
	for _, f := range sources["node"] {
		ast.Inspect(f, func(x ast.Node) bool { // drops["..."]
			if at, ok := x.(*ast.IndexExpr); ok {
				if of, ok := at.X.(*ast.Ident); ok && of.Name == "drops" {
					if text, ok := textOf(at.Index, nil); ok {
						counted[text] = true
					}
				}
			}
			return true
		})
	}
	if len(counted) < 50 {
		t.Fatalf("only %d drop reasons found in the sources", len(counted))
	}
	same(t, "Drop reasons", counted)
}

func TestOperations_HasEveryCounter(t *testing.T) {
	sources := daemonSources(t)
	counted := make(map[string]bool)
	for _, of := range []struct{ dir, kind, group string }{
		{"internal/tap", "Stats", "tap."},
		{"forwarder", "UnderlayStats", "underlay."},
		{"stack", "Stats", "gateway."},
		{"stack/dns", "Stats", "gateway.dns_"},
		{"node", "portTotals", "published."},
		{"node", "pathCounts", "path_mtu."},
		{"proxy", "Stats", "proxy."},
	} {
		members := jsonMembers(sources[of.dir], of.kind)
		if len(members) == 0 {
			t.Errorf("%s has no type %s with counters", of.dir, of.kind)
		}
		for _, m := range members {
			counted[of.group+m] = true
		}
	}
	counted["underlay.icmp_errors"] = true // node adds it
	same(t, "Counters", counted)
}

// same compares the first cells of a section's tables with what the program has.
func same(t *testing.T, title string, counted map[string]bool) {
	t.Helper()
	told := make(map[string]bool)
	for _, row := range tableRows(section(t, title)) {
		for _, name := range strings.Split(row[0], ", ") {
			told[strings.Trim(name, "`")] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(counted)) {
		if !told[name] {
			t.Errorf("docs/operations.md, %s: no row for `%s`", title, name)
		}
		delete(told, name)
	}
	for name := range told {
		t.Errorf("docs/operations.md, %s: nothing counts `%s`", title, name)
	}
}

// section is the text below "## title" up to the next such title.
func section(t *testing.T, title string) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut("\n"+string(page), "\n## "+title+"\n")
	if !ok {
		t.Fatalf("docs/operations.md has no section %q", title)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	return text
}

// cells are what stands between the bars of a table's line; a bar in backticks or behind a backslash is none.
var cells = regexp.MustCompile("(?:`[^`]*`|\\\\\\||[^|`])+")

// tableRows are the rows of all tables in text, without their heads.
func tableRows(text string) (rows [][]string) {
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case !strings.HasPrefix(line, "|"):
			inside = false
		case strings.HasPrefix(line, "|---"):
			inside = true
		case inside:
			row := cells.FindAllString(line, -1)
			for i := range row {
				row[i] = strings.TrimSpace(row[i])
			}
			rows = append(rows, row)
		}
	}
	return rows
}

// daemonSources are the daemon's packages by their directories.
func daemonSources(t *testing.T) map[string][]*ast.File {
	t.Helper()
	packages := make(map[string][]*ast.File)
	const root = "../.."
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		at, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if slices.Contains(notTheDaemon, at) || at != "." && strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err == nil {
			packages[filepath.Dir(at)] = append(packages[filepath.Dir(at)], f)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return packages
}

// logged tells the level of a line for the log, and the expression of its message.
func logged(call *ast.CallExpr) (level string, message ast.Expr, ok bool) {
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return "", nil, false
	}
	var of string // the logger
	switch x := method.X.(type) {
	case *ast.Ident:
		of = x.Name
	case *ast.SelectorExpr:
		of = x.Sel.Name
	}
	if !strings.EqualFold(of, "log") && of != "slog" {
		return "", nil, false
	}
	at, levels := 0, map[string]string{"Debug": "debug", "Info": "info", "Warn": "warn", "Error": "error", "Log": "varies", "LogAttrs": "varies"}
	name, withContext := strings.CutSuffix(method.Sel.Name, "Context")
	if withContext {
		at = 1
	}
	if name == "Log" || name == "LogAttrs" {
		at = 2
	}
	if level, ok = levels[name]; !ok || len(call.Args) <= at {
		return "", nil, false
	}
	return level, call.Args[at], true
}

// textOf is the value of a constant string.
func textOf(x ast.Expr, texts map[string]string) (string, bool) {
	switch x := x.(type) {
	case *ast.BasicLit:
		text, err := strconv.Unquote(x.Value)
		return text, err == nil && x.Kind == token.STRING
	case *ast.Ident:
		text, ok := texts[x.Name]
		return text, ok
	case *ast.BinaryExpr:
		a, okA := textOf(x.X, texts)
		b, okB := textOf(x.Y, texts)
		return a + b, okA && okB && x.Op == token.ADD
	}
	return "", false
}

// constants are the constant strings of a package.
func constants(files []*ast.File) map[string]string {
	texts := make(map[string]string)
	for _, f := range files {
		ast.Inspect(f, func(x ast.Node) bool {
			d, ok := x.(*ast.GenDecl)
			if !ok || d.Tok != token.CONST {
				return true
			}
			for _, spec := range d.Specs {
				s := spec.(*ast.ValueSpec)
				for i, v := range s.Values {
					if text, ok := textOf(v, texts); ok {
						texts[s.Names[i].Name] = text
					}
				}
			}
			return true
		})
	}
	return texts
}

// namesIn are the values of a package's dropNames.
func namesIn(files []*ast.File) (names []string) {
	for _, f := range files {
		ast.Inspect(f, func(x ast.Node) bool {
			s, ok := x.(*ast.ValueSpec)
			if !ok || s.Names[0].Name != "dropNames" {
				return true
			}
			for _, v := range s.Values[0].(*ast.CompositeLit).Elts {
				if text, ok := textOf(v.(*ast.KeyValueExpr).Value, nil); ok {
					names = append(names, text)
				}
			}
			return true
		})
	}
	return names
}

// jsonMembers are the names in JSON of a struct's members that are counters.
func jsonMembers(files []*ast.File, kind string) (names []string) {
	for _, f := range files {
		ast.Inspect(f, func(x ast.Node) bool {
			d, ok := x.(*ast.TypeSpec)
			if !ok || d.Name.Name != kind {
				return true
			}
			s, ok := d.Type.(*ast.StructType)
			if !ok {
				return true
			}
			for _, m := range s.Fields.List {
				of, ok := m.Type.(*ast.Ident)
				if !ok || m.Tag == nil || !slices.Contains([]string{"uint64", "int", "bool"}, of.Name) {
					continue
				}
				name, _, _ := strings.Cut(reflect.StructTag(strings.Trim(m.Tag.Value, "`")).Get("json"), ",")
				names = append(names, name)
			}
			return true
		})
	}
	return names
}
