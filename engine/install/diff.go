// This file shows a Plan to people.

package install

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/pmezard/go-difflib/difflib"
)

// Show writes what would be done, files as a unified diff against what is there.
func (p Plan) Show(w io.Writer) error {
	for _, c := range p.Changes {
		var err error
		switch c.Action {
		case Link:
			_, err = fmt.Fprintf(w, "%s %s -> %s\n", c.Action, c.Path, c.Target)
		case Write:
			_, err = fmt.Fprintf(w, "%s %s (mode %04o, %d bytes)\n", c.Action, c.Path, c.Mode, len(c.New))
		default:
			_, err = fmt.Fprintf(w, "%s %s\n", c.Action, c.Path)
		}
		if err == nil && c.Action == Write && !c.Bulky {
			err = c.diff(w)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c Change) diff(w io.Writer) error {
	from := "/dev/null"
	var old []string
	if c.Old != nil {
		from = c.Path
		old = slices.Collect(strings.Lines(string(c.Old)))
	}
	return difflib.WriteUnifiedDiff(w, difflib.UnifiedDiff{A: old, B: slices.Collect(strings.Lines(string(c.New))), FromFile: from, ToFile: c.Path, Context: 3})
}
