// rootless-ovl version: what this program was built from.

package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// Set by the linker in release builds (-X main.version=v1.2.3 -X main.commit=...); otherwise the build information tells.
var (
	version string
	commit  string
)

// build tells what this program was built from.
type build struct {
	Version   string `json:"version"`
	Commit    string `json:"commit"`
	Modified  bool   `json:"modified"` // the commit had changes on top
	GoVersion string `json:"go_version"`
	OS        string `json:"os"`
	Arch      string `json:"arch"`
}

func thisBuild() build {
	b := build{Version: version, Commit: commit, GoVersion: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	if bi, ok := debug.ReadBuildInfo(); ok {
		if b.Version == "" && bi.Main.Version != "(devel)" {
			b.Version = bi.Main.Version
		}
		for _, s := range bi.Settings {
			switch s.Key {
			case "vcs.revision":
				if b.Commit == "" {
					b.Commit = s.Value
				}
			case "vcs.modified":
				b.Modified = s.Value == "true"
			}
		}
	}
	if commit != "" {
		b.Modified = strings.HasSuffix(version, "-dirty") // as git describe --dirty says it
	}
	if b.Version == "" {
		b.Version = "devel"
	}
	return b
}

// line is the build for people.
func (b build) line() string {
	where := b.Commit
	if where == "" {
		where = "unknown"
	}
	if b.Modified {
		where += " with changes"
	}
	return fmt.Sprintf("rootless-ovl %s (commit %s, %s, %s/%s)\n", b.Version, where, b.GoVersion, b.OS, b.Arch)
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show what this program was built from",
		Long:    `Show the version, commit, Go version, operating system and architecture.`,
		Example: `  rootless-ovl version -o json`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b := thisBuild()
			return a.print(b, func(w io.Writer) {
				fmt.Fprint(w, b.line())
			})
		},
	}
}
