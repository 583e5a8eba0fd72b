// docs/cli.md says what the program does: every command and flag, and no other.

package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func TestDocs_HaveEveryCommandAndFlag(t *testing.T) {
	page, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for i, s := range strings.Split("\n"+string(page), "\n## ") {
		title, text, _ := strings.Cut(s, "\n")
		if i == 0 {
			title, text = "`rootless-ovl`", s
		}
		sections[strings.Trim(title, "`")] = text
	}

	a := &app{world: newBench(t).world}
	root := a.root()
	root.InitDefaultCompletionCmd()
	seen := map[string]bool{}
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		name := cmd.CommandPath()
		seen[name] = true
		text, ok := sections[name]
		if !ok {
			t.Errorf("docs/cli.md has no section \"## `%s`\"", name)
			return
		}
		var flags []string
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { flags = append(flags, f.Name) })
		for _, sub := range cmd.Commands() {
			if sub.Hidden || sub.Name() == "help" {
				continue
			}
			if name == "rootless-ovl completion" { // one a shell, with the same flags
				if !strings.Contains(text, sub.Name()) {
					t.Errorf("docs/cli.md, section %s, does not have %s", name, sub.Name())
				}
				sub.LocalFlags().VisitAll(func(f *pflag.Flag) { flags = append(flags, f.Name) })
				continue
			}
			visit(sub)
		}
		for _, f := range flags {
			if f != "help" && !strings.Contains(text, "`--"+f+"`") {
				t.Errorf("docs/cli.md, section %s, does not have `--%s`", name, f)
			}
		}
		for _, m := range regexp.MustCompile(`--([a-z][a-z0-9_-]+)`).FindAllStringSubmatch(text, -1) {
			if m[1] != "help" && !anyHasFlag(root, m[1]) {
				t.Errorf("docs/cli.md, section %s, has --%s, which no command has", name, m[1])
			}
		}
	}
	visit(root)
	for name := range sections {
		if !seen[name] {
			t.Errorf("docs/cli.md has the section %s, which is no command", name)
		}
	}
}

// anyHasFlag tells whether cmd or one below it has that flag: sections may point at each other's.
func anyHasFlag(cmd *cobra.Command, name string) bool {
	if cmd.LocalFlags().Lookup(name) != nil {
		return true
	}
	return slices.ContainsFunc(cmd.Commands(), func(sub *cobra.Command) bool { return anyHasFlag(sub, name) })
}

func TestHelp_OfEveryCommandHasAnExample(t *testing.T) {
	a := &app{world: newBench(t).world}
	for _, cmd := range a.root().Commands() {
		if cmd.HasSubCommands() {
			continue
		}
		if cmd.Short == "" || cmd.Long == "" || !strings.Contains(cmd.Example, "rootless-ovl "+cmd.Name()) {
			t.Errorf("%s: short %q, long %q, example %q", cmd.Name(), cmd.Short, cmd.Long, cmd.Example)
		}
	}
}
