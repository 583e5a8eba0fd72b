// Tests of the table and of the catalogue.

package main

import (
	"strings"
	"testing"
)

func TestTable_SaysWhoPassesWhat(t *testing.T) {
	cases := []testCase{{name: "a/both", about: "one", shared: true}, {name: "a/ours", about: "two"}}
	r := newResults(cases)
	r.add(systemOurs)
	r.add("other")
	r.set("a/both", systemOurs, true)
	r.set("a/both", "other", false)
	r.set("a/ours", systemOurs, false)
	text := r.markdown()
	for _, line := range []string{"| a/both | one | yes | no |", "| a/ours | two | no | - |", "| 1 of 2 | 0 of 1 |"} {
		if !strings.Contains(text, line) {
			t.Errorf("%q is not in\n%s", line, text)
		}
	}
	if failed := r.failed(systemOurs); len(failed) != 1 || failed[0] != "a/ours" {
		t.Errorf("failed: %v", failed)
	}
}

// A case that was never tried, since its site broke, is no pass.
func TestTable_WhatWasNotTriedFails(t *testing.T) {
	r := newResults([]testCase{{name: "a/ours"}})
	r.add(systemOurs)
	if failed := r.failed(systemOurs); len(failed) != 1 {
		t.Errorf("failed: %v", failed)
	}
}

func TestTable_ReplacesWhatIsBetweenTheMarkers(t *testing.T) {
	got, err := between("before\n"+markBegin+"\nold\n"+markEnd+"\nafter", "new")
	if err != nil || got != "before\n"+markBegin+"\n\nnew\n"+markEnd+"\nafter" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := between("no markers", "new"); err == nil {
		t.Error("no error without markers")
	}
}

func TestCatalogue_NamesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range catalogue() {
		if seen[c.name] || c.about == "" || strings.ContainsAny(c.name+c.about, "|\n") || c.run == nil {
			t.Errorf("%q: twice, or without a word, or with one that breaks the table", c.name)
		}
		seen[c.name] = true
	}
}
