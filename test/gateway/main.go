// This file reads the command line, runs the cases inside the lab, and says what came of them.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// The systems, as the table names them.
const (
	systemOurs  = "rootless-ovl"
	systemSlirp = "slirp4netns"
	systemPasta = "pasta"
)

var systems = []string{systemOurs, systemSlirp, systemPasta}

// packages have the systems that are not ours.
var packages = map[string]string{systemSlirp: "slirp4netns", systemPasta: "passt"}

// tableVar names the file that the inner stage writes the table to: it is another user who may not write the document.
const tableVar = "ROOTLESS_OVL_GATEWAY_TABLE"

type options struct {
	run       string
	system    string
	scale     bool
	list      bool
	verbose   bool
	writeDocs bool
	docs      string
}

func parseOptions() (options, error) {
	var o options
	fs := flag.NewFlagSet("gateway", flag.ContinueOnError)
	fs.StringVar(&o.run, "run", "", "run only cases whose name begins with one of these `prefixes`, separated by commas")
	fs.StringVar(&o.system, "system", "", "try only this `system`: "+strings.Join(systems, ", "))
	fs.BoolVar(&o.scale, "scale", false, "load cases in full length")
	fs.BoolVar(&o.list, "list", false, "list the cases and stop")
	fs.BoolVar(&o.verbose, "v", false, "show what cases log also when they pass")
	fs.BoolVar(&o.writeDocs, "write-docs", false, "put the table into the document, between its markers")
	fs.StringVar(&o.docs, "docs", "docs/gateway.md", "the document's `file`")
	if err := fs.Parse(os.Args[1:]); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if o.system != "" && !slices.Contains(systems, o.system) {
		return o, fmt.Errorf("-system %s: use one of %s", o.system, strings.Join(systems, ", "))
	}
	if len(o.cases()) == 0 {
		return o, fmt.Errorf("no case begins with %q: -list lists them", o.run)
	}
	if o.writeDocs && (o.run != "" || o.system != "") {
		return o, errors.New("-write-docs needs all cases and systems: leave -run and -system out")
	}
	return o, nil
}

// cases are those that are asked for.
func (o options) cases() []testCase {
	var chosen []testCase
	for _, c := range catalogue() {
		if o.run == "" || slices.ContainsFunc(strings.Split(o.run, ","), func(p string) bool { return strings.HasPrefix(c.name, p) }) {
			chosen = append(chosen, c)
		}
	}
	return chosen
}

// catalogue is every case, in the table's order.
func catalogue() []testCase {
	return slices.Concat(egressCases, publishCases, nameCases, doorCases, policyCases, outsideCases, loadCases)
}

func main() { os.Exit(run()) }

func run() int {
	if command := commands[first(os.Args[1:])]; command != nil && len(os.Args) == 3 {
		if err := command(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "gateway:", err)
			return 1
		}
		return 0
	}
	o, err := parseOptions()
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, "gateway:", err)
		return 2
	case o.list:
		for _, c := range o.cases() {
			fmt.Printf("%-34s %s\n", c.name, c.about)
		}
		return 0
	}
	if os.Getenv(tableVar) != "" {
		return lab.Main(func() int { return tryAll(o) })
	}
	code, err := outermost(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		return 1
	}
	return code
}

// outermost is the caller's own process: it alone may write the document.
func outermost(o options) (int, error) {
	if o.writeDocs {
		if err := checkMarkers(o.docs); err != nil {
			return 1, err
		}
	}
	file, err := os.CreateTemp("", "rovl-gateway-")
	if err != nil {
		return 1, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if err := errors.Join(file.Chmod(0o666), os.Setenv(tableVar, file.Name())); err != nil {
		return 1, err
	}
	code := lab.Main(func() int { return tryAll(o) })
	if !o.writeDocs {
		return code, nil
	}
	table, err := os.ReadFile(file.Name())
	if err != nil {
		return 1, err
	}
	if len(table) == 0 {
		return 1, errors.New("there is no table: see above")
	}
	if err := writeDocs(o.docs, string(table)); err != nil {
		return 1, err
	}
	fmt.Println("table:", o.docs)
	return code, nil
}

// tryAll runs inside the lab.
func tryAll(o options) int {
	begin := time.Now()
	results := newResults(o.cases())
	var wg sync.WaitGroup
	for _, system := range systems {
		if o.system != "" && o.system != system {
			continue
		}
		if pkg := packages[system]; pkg != "" {
			if _, err := exec.LookPath(map[string]string{systemSlirp: "slirp4netns", systemPasta: "pasta"}[system]); err != nil {
				fmt.Printf("%s is not installed: sudo apt-get install -y --no-install-recommends %s\n", system, pkg)
				continue
			}
		}
		results.add(system)
		// What the others fail costs time, in which ours are tried: their cases wait for little else than time.
		wg.Go(func() { trySystem(o, system, results) })
	}
	wg.Wait()
	text := results.markdown()
	fmt.Print("\n", text)
	if err := handOut(text); err != nil {
		fmt.Println("gateway:", err)
		return 1
	}
	failed := results.failed(systemOurs)
	fmt.Printf("%d cases in %.0f s; rootless-ovl fails %d", len(results.cases), time.Since(begin).Seconds(), len(failed))
	if len(failed) > 0 {
		fmt.Printf(": %s\n", strings.Join(failed, ", "))
		return 1
	}
	fmt.Println()
	return 0
}

// This program as a command inside a container.
const (
	serveOnceCommand = "serve-once" // PORT: tells the first client its own address, and ends
	fetchCommand     = "fetch"      // ADDR:PORT: prints what the server says
	echoCommand      = "echo"       // ADDR:PORT: serves what it is sent, until it is killed
)

var commands = map[string]func(string) error{serveOnceCommand: serveOnce, fetchCommand: fetch, echoCommand: echoForever}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

func fetch(addr string) error {
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(os.Stdout, c)
	return err
}

func echoForever(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer l.Close()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			echo(c.(*net.TCPConn))
		}()
	}
}

func serveOnce(port string) error {
	l, err := net.Listen("tcp4", ":"+port)
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err = fmt.Fprint(c, remote(c).Addr()); err != nil {
		return err
	}
	// The connections of a command end with it: the client has read it all when it closes.
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err = io.Copy(io.Discard, c)
	return err
}

// executable is this program, where the hosts' user can run it.
func executable(t *trial) string {
	path, err := os.Executable()
	t.must("this program", err)
	return path
}

// handOut writes the table to the caller's file. It is there: making files that others own in /tmp is what kernels refuse.
func handOut(text string) error {
	f, err := os.OpenFile(os.Getenv(tableVar), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// trySystem runs the cases of one system, one after the other.
func trySystem(o options, system string, results *results) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	whole := newTrial(ctx, system, o)
	defer whole.end()
	var s *site
	for _, c := range o.cases() {
		if system != systemOurs && !c.shared {
			continue
		}
		if s == nil {
			if !whole.do(func() { s = newSite(whole, system) }) {
				fmt.Printf("%s: no site: %s\n", system, whole.text())
				return
			}
			s.scale = o.scale
		}
		t := newTrial(ctx, c.name, o)
		begin := time.Now()
		s.t.set(t)
		fine := t.try(c, s)
		s.t.set(nil)
		results.set(c.name, system, fine)
		fmt.Printf("%-5s %-34s %-13s %5.1f s%s\n", map[bool]string{true: "ok", false: "FAIL"}[fine], c.name, system, time.Since(begin).Seconds(), t.said(fine))
	}
}
