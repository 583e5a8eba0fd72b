// This file holds the whole program to the rule of Verified: a checksum may be taken as right, and the container's kernel
// be told so, only where something has checked it - the kernel, by the outer UDP checksum, or the stack.

package packet

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// Who may call a packet verified, by path from the root of the module.
var maySetVerified = []string{
	"forwarder/udp.go",   // the udp format: the outer checksum, which is never off, covers the packet
	"forwarder/vxlan.go", // the outer checksum of our own nodes covers it, or it was summed there
	"stack/",             // the stack made the packet, or checked it
}

// Who may turn a right checksum into one that is owed; its callers look at Verified first.
var mayMarkPartial = []string{"internal/tap/device.go", "forwarder/vxlan.go"}

func TestVerified_IsSetWhereChecksumsAreChecked(t *testing.T) {
	const root = "../.."
	seen := 0
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			if e != nil && e.IsDir() && path != root && (strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata") {
				return filepath.SkipDir
			}
			return err
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		if !imports(file, "rootless-ovl/internal/packet") && file.Name.Name != "packet" {
			return nil
		}
		refuse := func(n ast.Node, allowed []string, what string) {
			seen++
			for _, a := range allowed {
				if rel == a || (strings.HasSuffix(a, "/") && strings.HasPrefix(rel, a)) {
					return
				}
			}
			t.Errorf("%s:%d %s; only %s may", rel, fset.Position(n.Pos()).Line, what, strings.Join(allowed, ", "))
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr:
				if id, ok := n.Key.(*ast.Ident); ok && id.Name == "Verified" {
					refuse(n, maySetVerified, "calls a packet verified")
				}
			case *ast.AssignStmt:
				for _, l := range n.Lhs {
					if s, ok := l.(*ast.SelectorExpr); ok && s.Sel.Name == "Verified" {
						refuse(n, maySetVerified, "calls a packet verified")
					}
				}
			case *ast.CallExpr:
				if s, ok := n.Fun.(*ast.SelectorExpr); ok && s.Sel.Name == "MarkPartial" {
					refuse(n, mayMarkPartial, "marks a checksum as owed")
				}
			case *ast.SelectorExpr:
				if n.Sel.Name == "SO_NO_CHECK" {
					t.Errorf("%s:%d turns the outer UDP checksum off: packets could not be called verified", rel, fset.Position(n.Pos()).Line)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 2 {
		t.Errorf("%d places found: the test looks in the wrong place", seen)
	}
}

func imports(f *ast.File, suffix string) bool {
	for _, i := range f.Imports {
		if strings.HasSuffix(strings.Trim(i.Path.Value, `"`), suffix) {
			return true
		}
	}
	return false
}
