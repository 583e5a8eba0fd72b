// This file writes the results: for people, for programs, and for the document.

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// result is one row of one peer. Ratio is against another peer by its name, the median of the ratios within each round.
type result struct {
	Row      string             `json:"row"`
	Underlay string             `json:"underlay"`
	Peer     string             `json:"peer"`
	Unit     string             `json:"unit"`
	Median   float64            `json:"median"`
	Min      float64            `json:"min"`
	Max      float64            `json:"max"`
	Ratio    map[string]float64 `json:"ratio"`
	Wanted   float64            `json:"wanted,omitempty"` // of the ratio against the first baseline
	Values   []float64          `json:"values"`           // of every round, sorted
}

// report is the outcome of a run.
type report struct {
	header
	Seconds float64  `json:"seconds"`
	Rows    []result `json:"rows"`
	Missing []string `json:"missing"` // peers that are not installed, with the line that installs them
	Notes   []string `json:"notes"`
	Failed  []string `json:"failed"`
}

// table is rows with the same peers, side by side.
type table struct {
	underlay string
	peers    []string
	bases    []string // the ratios of rootless-ovl to show
	wants    bool     // there is a line whose first ratio is laid down
	lines    []line
}

type line struct {
	row, unit string
	results   map[string]result
}

// tables puts neighbouring rows together that are of the same underlay and meant for the same peers.
func (r *report) tables() []table {
	var tables []table
	var of []experiment // of each table's rows
	for _, res := range r.Rows {
		e := experimentOf(res.Row)
		if n := len(tables); n == 0 || tables[n-1].underlay != res.Underlay || !slices.Equal(of[n-1].peers, e.peers) {
			tables = append(tables, table{underlay: res.Underlay})
			of = append(of, e)
		}
		tables[len(tables)-1].add(res)
	}
	for i, e := range of {
		tables[i].peers = only(e.peers, tables[i].peers)
		tables[i].bases = only(e.baselines, tables[i].bases)
	}
	return tables
}

// add puts a result on the table's last line, or on a new one.
func (t *table) add(res result) {
	if n := len(t.lines); n == 0 || t.lines[n-1].row != res.Row {
		t.lines = append(t.lines, line{row: res.Row, unit: res.Unit, results: map[string]result{}})
	}
	t.lines[len(t.lines)-1].results[res.Peer] = res
	t.peers = append(t.peers, res.Peer)
	if res.Peer == peerOurs {
		t.bases = slices.AppendSeq(t.bases, maps.Keys(res.Ratio))
		t.wants = t.wants || res.Wanted > 0
	}
}

// experimentOf finds a row in the catalogue.
func experimentOf(row string) experiment {
	for _, e := range catalogue {
		for _, r := range e.rows {
			if r.name == row {
				return e
			}
		}
	}
	return experiment{}
}

// only are those of all that some has, in all's order.
func only(all, some []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return !slices.Contains(some, s) })
}

// cells are a table's head and body as text.
func (t table) cells() (head []string, body [][]string) {
	head = append([]string{"row", "unit"}, t.peers...)
	for _, base := range t.bases {
		head = append(head, "of "+base)
	}
	if t.wants {
		head = append(head, "wanted")
	}
	steady := slices.ContainsFunc(t.lines, func(l line) bool { return experimentOf(l.row).steady })
	if steady {
		head = append(head, "lowest of median")
	}
	for _, l := range t.lines {
		cells := []string{l.row, l.unit}
		for _, peer := range t.peers {
			cell := "-"
			if res, ok := l.results[peer]; ok {
				cell = res.text()
			}
			cells = append(cells, cell)
		}
		for _, base := range t.bases {
			cell := "-"
			if ratio, ok := l.results[peerOurs].Ratio[base]; ok {
				cell = number(ratio)
			}
			cells = append(cells, cell)
		}
		if t.wants {
			cell := "-"
			if wanted := l.results[peerOurs].Wanted; wanted > 0 {
				cell = number(wanted)
			}
			cells = append(cells, cell)
		}
		if steady {
			cell := "-"
			if res, ok := l.results[peerOurs]; ok && experimentOf(l.row).steady && res.Median > 0 {
				cell = number(res.Min / res.Median)
			}
			cells = append(cells, cell)
		}
		body = append(body, cells)
	}
	return head, body
}

// text is the median, with the lowest and highest unless they are the same.
func (res result) text() string {
	low, high := number(res.Min), number(res.Max)
	if low == high {
		return number(res.Median)
	}
	return fmt.Sprintf("%s (%s-%s)", number(res.Median), low, high)
}

// number has three digits that matter, and no exponent.
func number(f float64) string {
	if f == 0 || math.IsNaN(f) || math.IsInf(f, 0) {
		return strconv.FormatFloat(f, 'f', -1, 64)
	}
	digits := 2 - int(math.Floor(math.Log10(math.Abs(f))))
	return strconv.FormatFloat(f, 'f', min(max(digits, 0), 6), 64)
}

// describe is the header in lines.
func (r *report) describe() []string {
	versions := make([]string, 0, len(r.Versions))
	for _, name := range slices.Sorted(maps.Keys(r.Versions)) {
		versions = append(versions, name+" "+r.Versions[name])
	}
	return []string{
		fmt.Sprintf("%s: commit %s, %s, %.0f s", r.Command, r.Commit, r.When, r.Seconds),
		fmt.Sprintf("Machine: %d CPUs (%s), %d MB, Linux %s", r.CPUs, r.CPU, r.MemoryMB, r.Kernel),
		"Versions: " + strings.Join(versions, ", "),
		fmt.Sprintf("Median (lowest-highest) of %d rounds; the last columns are rootless-ovl's ratio, the median of those within each round.", r.Rounds),
	}
}

// problems are what is not as it should be, in lines.
func (r *report) problems() []string {
	var lines []string
	for _, of := range []struct {
		what  string
		texts []string
	}{{"Missing: ", r.Missing}, {"Note: ", r.Notes}, {"FAILED: ", r.Failed}} {
		for _, text := range of.texts {
			lines = append(lines, of.what+text)
		}
	}
	return lines
}

// text is the report for people.
func (r *report) text() string {
	var b bytes.Buffer
	for _, text := range r.describe() {
		fmt.Fprintln(&b, text)
	}
	underlay := ""
	for _, t := range r.tables() {
		if t.underlay != underlay {
			underlay = t.underlay
			fmt.Fprintf(&b, "\nUnderlay %s\n", underlay)
		}
		fmt.Fprintln(&b)
		w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		head, body := t.cells()
		for _, cells := range append([][]string{head}, body...) {
			fmt.Fprintln(w, "  "+strings.Join(cells, "\t"))
		}
		w.Flush() // into memory: it cannot fail
	}
	if problems := r.problems(); len(problems) > 0 {
		fmt.Fprintf(&b, "\n%s\n", strings.Join(problems, "\n"))
	}
	return b.String()
}

// markdown is the report for the document.
func (r *report) markdown() string {
	var b strings.Builder
	for _, text := range r.describe() {
		fmt.Fprintf(&b, "- %s\n", text)
	}
	for _, text := range r.problems() {
		fmt.Fprintf(&b, "- %s\n", text)
	}
	underlay := ""
	for _, t := range r.tables() {
		if t.underlay != underlay {
			underlay = t.underlay
			fmt.Fprintf(&b, "\n### Underlay %s\n", underlay)
		}
		head, body := t.cells()
		rule := slices.Repeat([]string{"---"}, len(head))
		fmt.Fprintln(&b)
		for _, cells := range append([][]string{head, rule}, body...) {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | "))
		}
	}
	return b.String()
}

// writeJSON writes the report for programs.
func (r *report) writeJSON(file string) error {
	for _, list := range []*[]string{&r.Missing, &r.Notes, &r.Failed} {
		if *list == nil {
			*list = []string{} // [] rather than null
		}
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return writeWhole(file, append(text, '\n'))
}

// The markers between which the document has the table.
const (
	markBegin = "<!-- bench: begin (make bench ARGS=-write-docs writes up to the end mark) -->"
	markEnd   = "<!-- bench: end -->"
)

var errNoMarkers = errors.New("no place for the table: it needs these two lines, in this order")

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

// writeDocs puts the table into the document.
func (r *report) writeDocs(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	changed, err := between(string(text), r.markdown())
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return writeWhole(file, []byte(changed))
}

// between replaces what is between the markers.
func between(text, table string) (string, error) {
	before, rest, ok := strings.Cut(text, markBegin)
	_, after, ok2 := strings.Cut(rest, markEnd)
	if !ok || !ok2 {
		return "", fmt.Errorf("%w: %s %s", errNoMarkers, markBegin, markEnd)
	}
	return before + markBegin + "\n\n" + table + "\n" + markEnd + after, nil
}

// writeWhole replaces a file in one step.
func writeWhole(file string, text []byte) error {
	temporary := file + ".new"
	if err := os.WriteFile(temporary, text, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, file)
}
