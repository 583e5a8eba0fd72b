// This file reads the command line and runs the program's stages.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// defaultUser runs the daemons when sudo does not say who called.
const defaultUser = 65534

// options are the command line.
type options struct {
	rows      string
	underlay  string
	rounds    int
	seconds   int
	limit     time.Duration
	binary    string
	commit    string
	results   string
	writeDocs bool
	docs      string
	uid       int
	list      bool
}

func parseOptions(args []string, stderr io.Writer) (options, error) {
	var o options
	uid := defaultUser
	if n, err := strconv.Atoi(os.Getenv("SUDO_UID")); err == nil && n > 0 {
		uid = n
	}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.rows, "rows", "", "measure only rows that begin with one of these `prefixes`, separated by commas")
	fs.StringVar(&o.underlay, "underlay", "", "measure only this `underlay`: veth or nic-like")
	fs.IntVar(&o.rounds, "rounds", 3, "`number` of rounds")
	fs.IntVar(&o.seconds, "seconds", 3, "`seconds` of a TCP measurement, after one second that does not count")
	fs.DurationVar(&o.limit, "limit", 35*time.Minute, "`time` after which the bench stops and reports what it has")
	fs.StringVar(&o.binary, "binary", "bin/rootless-ovl", "`path` of rootless-ovl")
	fs.StringVar(&o.commit, "commit", "unknown", "`commit` to name in the report")
	fs.StringVar(&o.results, "results", "test/bench/results/latest.json", "`file` to write the results to")
	fs.BoolVar(&o.writeDocs, "write-docs", false, "put the table into the document, between its markers")
	fs.StringVar(&o.docs, "docs", "docs/performance.md", "the document's `file`")
	fs.IntVar(&o.uid, "uid", uid, "unprivileged `uid` of the daemons and containers")
	fs.BoolVar(&o.list, "list", false, "list the rows and stop")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.underlay != "" && o.underlay != underlayVeth && o.underlay != underlayNIC:
		return o, fmt.Errorf("-underlay %s: use %s or %s", o.underlay, underlayVeth, underlayNIC)
	case o.rounds < 1 || o.seconds < 1 || o.limit <= 0:
		return o, errors.New("-rounds, -seconds and -limit must be above zero")
	case o.uid <= 0:
		return o, errors.New("-uid must be that of an unprivileged user")
	case len(o.experiments()) == 0:
		return o, fmt.Errorf("no row begins with %q: -list lists them", o.rows)
	}
	return o, nil
}

// wants reports whether a row is asked for.
func (o options) wants(row string) bool {
	if o.rows == "" {
		return true
	}
	for prefix := range strings.SplitSeq(o.rows, ",") {
		if strings.HasPrefix(row, strings.TrimSpace(prefix)) {
			return true
		}
	}
	return false
}

// experiments are those that have a row which is asked for.
func (o options) experiments() []experiment {
	var chosen []experiment
	for _, e := range catalogue {
		for _, r := range e.rows {
			if o.wants(r.name) {
				chosen = append(chosen, e)
				break
			}
		}
	}
	return chosen
}

func (o options) underlays() []string {
	if o.underlay != "" {
		return []string{o.underlay}
	}
	return []string{underlayVeth, underlayNIC}
}

func init() {
	// The outer stage starts the inner one from the main thread, whose end is then the inner one's (Pdeathsig).
	runtime.LockOSThread()
}

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if len(args) > 0 && args[0] == loadCommand {
		if err := runLoad(ctx, args[1:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintf(os.Stderr, "bench load: %v\n", err)
			return 1
		}
		return 0
	}
	if len(args) > 1 && args[0] == reapCommand {
		code, err := reap(args[1:])
		if err != nil {
			fmt.Fprintf(os.Stderr, "bench reap: %v\n", err)
		}
		return code
	}
	o, err := parseOptions(args, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		return 2
	case o.list:
		for _, e := range catalogue {
			for _, r := range e.rows {
				fmt.Printf("%-28s %-8s %s\n", r.name, r.unit, r.about)
			}
		}
		return 0
	}
	if dir := os.Getenv(stageVariable); dir != "" {
		err = innerStage(ctx, o, dir)
	} else {
		err = outerStage(ctx, o, args)
	}
	if err != nil && !errors.Is(err, errReported) {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
	}
	if err != nil {
		return 1
	}
	return 0
}
