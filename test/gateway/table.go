// This file is the table of who passes what, and its place in the document.

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
)

// results say who passed what. Its methods may be called from any goroutine.
type results struct {
	cases []testCase

	mu      sync.Mutex
	systems []string
	passed  map[[2]string]bool // by case and system
}

func newResults(cases []testCase) *results {
	return &results{cases: cases, passed: map[[2]string]bool{}}
}

// add makes a column.
func (r *results) add(system string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.systems = append(r.systems, system)
}

func (r *results) set(name, system string, passed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.passed[[2]string{name, system}] = passed
}

// failed are the cases that a system was asked and did not pass, or never came to.
func (r *results) failed(system string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var names []string
	for _, c := range r.cases {
		passed, tried := r.passed[[2]string{c.name, system}]
		if tried && !passed || !tried && slices.Contains(r.systems, system) && (c.shared || system == systemOurs) {
			names = append(names, c.name)
		}
	}
	return names
}

// markdown is the table, with a line of totals.
func (r *results) markdown() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	var versions []string
	for _, s := range r.systems {
		if v := version(s); v != "" {
			versions = append(versions, v)
		}
	}
	if len(versions) > 0 {
		fmt.Fprintf(&b, "Beside %s. A dash: not asked, since it is not what that program is for.\n\n", strings.Join(versions, ", "))
	}
	fmt.Fprintf(&b, "| case | what | %s |\n| --- | --- |%s\n", strings.Join(r.systems, " | "), strings.Repeat(" --- |", len(r.systems)))
	passes, asked := map[string]int{}, map[string]int{}
	for _, c := range r.cases {
		fmt.Fprintf(&b, "| %s | %s |", c.name, c.about)
		for _, s := range r.systems {
			cell := "-"
			if passed, tried := r.passed[[2]string{c.name, s}]; tried {
				asked[s]++
				cell = "no"
				if passed {
					passes[s]++
					cell = "yes"
				}
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteByte('\n')
	}
	b.WriteString("| | passed of those asked |")
	for _, s := range r.systems {
		fmt.Fprintf(&b, " %d of %d |", passes[s], asked[s])
	}
	b.WriteByte('\n')
	return b.String()
}

// version is the Debian package of a system that is not ours.
func version(system string) string {
	pkg := packages[system]
	if pkg == "" {
		return ""
	}
	out, err := exec.Command("dpkg-query", "-W", "-f", "${Version}", pkg).Output()
	if err != nil {
		return system
	}
	return system + " " + strings.TrimSpace(string(out))
}

// The markers between which the document has the table.
const (
	markBegin = "<!-- gateway: begin (make gateway ARGS=-write-docs writes up to the end mark) -->"
	markEnd   = "<!-- gateway: end -->"
)

// checkMarkers makes sure, before a long run, that the document has a place for the table.
func checkMarkers(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if _, err := between(string(text), ""); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

func writeDocs(file, table string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	changed, err := between(string(text), table)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := os.WriteFile(file+".new", []byte(changed), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// between replaces what is between the markers.
func between(text, table string) (string, error) {
	before, rest, ok := strings.Cut(text, markBegin)
	_, after, ok2 := strings.Cut(rest, markEnd)
	if !ok || !ok2 {
		return "", errors.New("no place for the table: it needs these two lines, in this order: " + markBegin + " " + markEnd)
	}
	return before + markBegin + "\n\n" + table + "\n" + markEnd + after, nil
}
