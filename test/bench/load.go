// This file is the program's second face: `bench load NAME` is a load generator, run inside a namespace. A generator that
// serves prints "ready" when it does; all end when their standard input does.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// loadCommand is the first argument of a load generator.
const loadCommand = "load"

// ready is the line that says that a server serves.
const ready = "ready"

// loadOptions are the flags of the generators; each uses some.
type loadOptions struct {
	addr    netip.AddrPort // to serve at, or to send to
	cpu     int
	seconds float64
	workers int
	count   int // of connections; 0: as many as the time allows
	ports   int // neighbouring ports to dial
	size    int // bytes of UDP payload
	gso     bool
}

// loads are the generators by name.
var loads = map[string]func(ctx context.Context, o loadOptions, in io.Reader, out io.Writer) error{
	"udp-receive": udpReceive,
	"udp-send":    udpSend,
	"udp-flood":   udpFlood,
	"ping":        pingLoad,
	"rtt-serve":   rttServe,
	"rtt":         rttClient,
	"conns-serve": connsServe,
	"conns":       connsClient,
	"hold-serve":  holdServe,
	"hold":        holdClient,
}

func runLoad(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	if len(args) == 0 || loads[args[0]] == nil {
		return fmt.Errorf("no such load: %q", args)
	}
	var o loadOptions
	fs := flag.NewFlagSet(args[0], flag.ContinueOnError)
	fs.TextVar(&o.addr, "addr", netip.AddrPort{}, "`address` to serve at or send to")
	fs.IntVar(&o.cpu, "cpu", -1, "`CPU` to run on")
	fs.Float64Var(&o.seconds, "seconds", 1, "`time` to measure")
	fs.IntVar(&o.workers, "workers", 1, "`number` of connections at a time")
	fs.IntVar(&o.count, "count", 0, "`number` of connections, in place of a time")
	fs.IntVar(&o.ports, "ports", connsPorts, "`number` of neighbouring ports to dial")
	fs.IntVar(&o.size, "size", 64, "`bytes` of UDP payload")
	fs.BoolVar(&o.gso, "gso", false, "send with UDP_SEGMENT, receive with UDP_GRO")
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	return loads[args[0]](ctx, o, in, out)
}

// pin keeps the calling goroutine on its thread and the thread on a CPU, if there is such a CPU.
func pin(cpu int) error {
	runtime.LockOSThread()
	if cpu < 0 || cpu >= runtime.NumCPU() {
		return nil
	}
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(0, &set)
}

// generator is a running load generator, spoken to in lines.
type generator struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
	stderr strings.Builder
}

// generate starts a load generator at an end. It is killed when the context ends.
func generate(ctx context.Context, at end, args ...string) (*generator, error) {
	g := &generator{cmd: exec.CommandContext(ctx, "/proc/self/exe", append([]string{loadCommand}, args...)...)}
	g.cmd.Stderr = &g.stderr
	g.cmd.WaitDelay = time.Second
	g.cmd.Env = []string{"PATH=/usr/bin:/bin"}
	var err error
	if g.in, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	g.out = bufio.NewScanner(out)
	if err := at.start(g.cmd); err != nil {
		return nil, fmt.Errorf("load %s: %w", args[0], err)
	}
	return g, nil
}

// serve starts a load generator and waits until it is ready.
func serve(ctx context.Context, at end, args ...string) (*generator, error) {
	g, err := generate(ctx, at, args...)
	if err != nil {
		return nil, err
	}
	line, err := g.line()
	if err == nil && line != ready {
		err = fmt.Errorf("load %s: %q instead of %q", args[0], line, ready)
	}
	if err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

// line reads the generator's next line.
func (g *generator) line() (string, error) {
	if !g.out.Scan() {
		err := errors.Join(g.out.Err(), g.cmd.Wait())
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return "", fmt.Errorf("%s: %w: %s", strings.Join(g.cmd.Args[1:], " "), err, tail(g.stderr.String()))
	}
	return g.out.Text(), nil
}

// ask sends a line, unless it is empty, and decodes the answer.
func (g *generator) ask(into any, line string) error {
	if line != "" {
		if _, err := io.WriteString(g.in, line+"\n"); err != nil {
			return err
		}
	}
	answer, err := g.line()
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(answer), into)
}

// close ends the generator.
func (g *generator) close() {
	g.in.Close()
	end := time.AfterFunc(time.Second, func() { _ = g.cmd.Process.Kill() })
	defer end.Stop()
	_ = g.cmd.Wait() // how it ended does not matter any more
}

// answer writes v as one line of JSON.
func answer(out io.Writer, v any) error { return json.NewEncoder(out).Encode(v) }

// sayReady tells the other side that the generator serves.
func sayReady(out io.Writer) error {
	_, err := fmt.Fprintln(out, ready)
	return err
}

// untilEOF waits for the end of in.
func untilEOF(in io.Reader) { _, _ = io.Copy(io.Discard, in) }
