// This file is what the daemons hold: measured when nothing is attached, and judged over the whole run; and what they log.

package main

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// held is what a daemon has at one moment.
type held struct {
	at      time.Time
	rss     int // KiB
	files   int // descriptors
	taps    int // descriptors of /dev/net/tun
	threads int
	kinds   map[string]int // descriptors, by what they are of
}

// samples are those of one node, and which daemon they are of.
type samples struct {
	quiet []held // with nothing attached
	busy  []held // with containers
	pid   int    // of the daemon that the quiet ones are of
}

// allowances are by how much a figure may be higher at the end than at the beginning. Go keeps a thread for each system call that once blocked, and
// memory moves by what the last collection left.
var allowances = []struct {
	what      string
	of        func(held) int
	allowance int
}{
	{"RSS (KiB)", func(h held) int { return h.rss }, 16 << 10},
	{"descriptors", func(h held) int { return h.files }, 6},
	{"threads", func(h held) int { return h.threads }, 16},
}

// measure reads what a process has.
func measure(pid int) (held, error) {
	h := held{at: time.Now(), kinds: map[string]int{}}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return h, err
	}
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "VmRSS:":
			h.rss, _ = strconv.Atoi(fields[1])
		case "Threads:":
			h.threads, _ = strconv.Atoi(fields[1])
		}
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return h, err
	}
	for _, e := range entries {
		h.files++
		to, err := os.Readlink(dir + "/" + e.Name())
		if err != nil {
			continue
		}
		if to == "/dev/net/tun" {
			h.taps++
		}
		if kind, _, ok := strings.Cut(to, ":["); ok {
			to = kind
		}
		h.kinds[to]++
	}
	return h, nil
}

// sample measures all daemons.
func (r *run) sample(quiet bool) {
	for _, n := range r.nodes {
		pid := n.daemon().PID
		h, err := measure(pid)
		if err != nil {
			r.violation("%s: %v", n.Name, err)
		}
		if !quiet {
			n.leaks.busy = append(n.leaks.busy, h)
			continue
		}
		if pid != n.leaks.pid { // another daemon begins anew
			n.leaks.quiet, n.leaks.pid = nil, pid
		}
		n.leaks.quiet = append(n.leaks.quiet, h)
		if h.taps > 0 {
			r.violation("%s: nothing is attached, and the daemon has %d descriptors of TAPs", n.Name, h.taps)
		}
	}
}

// quiet takes all containers away, half of them by detaching, waits until the nodes have noticed, and measures them.
func (r *run) quiet() {
	r.sample(false)
	for i, m := range slices.Clone(r.members) {
		if m.attached && !m.unsure && i%2 == 0 {
			r.drop(m)
			r.gone(m)
			if result := m.node.CLI("detach", m.name); result.Code != 0 {
				r.violation("detach %s: %s", m.name, result.Stderr)
			}
			m.attached, m.name, m.ports = false, "", nil
		} else if m.attached {
			r.gone(m)
		}
		r.kill(m)
	}
	deadline := time.Now().Add(settling)
	for {
		wrong := r.disagreements()
		if len(wrong) == 0 && len(r.dying) == 0 {
			break
		}
		if time.Now().After(deadline) {
			r.violation("all containers have gone, and after %v there is still: %v %v", settling, wrong, r.dying)
		}
		time.Sleep(250 * time.Millisecond)
	}
	// A load's memory is given back at the second look after it, which are three seconds apart.
	time.Sleep(8 * time.Second)
	r.sample(true)
	r.say("quiet: %s", strings.Join(r.eachNode(func(n *node) string {
		h := n.leaks.quiet[len(n.leaks.quiet)-1]
		return fmt.Sprintf("%s %d KiB, %d descriptors, %d threads", n.Name, h.rss, h.files, h.threads)
	}), "; "))
}

// judgeLeaks fails the run where a figure has risen.
func (r *run) judgeLeaks() {
	for _, n := range r.nodes {
		for _, a := range allowances {
			var figures []int
			for _, h := range n.leaks.quiet {
				figures = append(figures, a.of(h))
			}
			if rise := risen(figures); rise > a.allowance {
				first, last := n.leaks.quiet[0], n.leaks.quiet[len(n.leaks.quiet)-1]
				r.t.Errorf("%s: %s rose by %d: %v; descriptors at first %v, at last %v", n.Name, a.what, rise, figures, first.kinds, last.kinds)
			}
		}
	}
	if r.t.Failed() {
		r.dump()
	}
}

// moreGoroutines is by how many goroutines the daemons may differ.
const moreGoroutines = 25

// countGoroutines ends the daemons, each with a list of its goroutines. Nothing is attached to any: one that has run for long has about as many as one
// that was started a while ago, or it leaks.
func (r *run) countGoroutines() {
	counts := map[string]int{}
	least := 0
	for _, n := range r.nodes {
		counts[n.Name] = n.daemon().Goroutines()
		if least == 0 || counts[n.Name] < least {
			least = counts[n.Name]
		}
	}
	fmt.Printf("  goroutines at the end: %v\n", counts)
	for name, count := range counts {
		if count > least+moreGoroutines {
			r.t.Errorf("%s has %d goroutines, another node %d", name, count, least)
		}
	}
}

// risen is by how much figures rise from their first to their last, by their slope after a warm-up: the median of the slopes between all pairs
// (Theil and Sen), which a few that stand out do not move. It is 0 where they are too few to tell a slope from a step.
func risen(figures []int) int {
	warm := figures[len(figures)/5:]
	if len(warm) < 8 {
		return 0
	}
	var slopes []float64
	for i := range warm {
		for j := i + 1; j < len(warm); j++ {
			slopes = append(slopes, float64(warm[j]-warm[i])/float64(j-i))
		}
	}
	slices.Sort(slopes)
	return int(slopes[len(slopes)/2] * float64(len(warm)-1))
}

// print tells first, last and most of each figure.
func (s *samples) print(name string) {
	for _, of := range []struct {
		when string
		list []held
	}{{"nothing attached", s.quiet}, {"with containers", s.busy}} {
		if len(of.list) == 0 {
			continue
		}
		fmt.Printf("  %s, %s, %d samples:", name, of.when, len(of.list))
		for _, a := range allowances {
			most := 0
			for _, h := range of.list {
				most = max(most, a.of(h))
			}
			fmt.Printf("  %s %d first, %d last, %d most", a.what, a.of(of.list[0]), a.of(of.list[len(of.list)-1]), most)
		}
		fmt.Println()
	}
}

// logReader reads what a node's daemons log, piece by piece.
type logReader struct {
	path  string
	at    int
	warns map[string]int
	lines int
}

var (
	message = regexp.MustCompile(`level=(\w+) msg=("(?:[^"\\]|\\.)*"|\S+)`)
	// expected are the errors that faults bring about.
	expected = []*regexp.Regexp{}
)

// logged reads what a node's daemon has logged since the last time. An error that nobody expects, or a crash, is a violation of the run.
func (r *run) logged(n *node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := n.logs
	path := n.daemon().Log
	if l.path != path {
		l.path, l.at = path, 0
	}
	b, err := os.ReadFile(path)
	if err != nil {
		r.t.Errorf("%s: %v", n.Name, err)
		return
	}
	news := b[l.at:]
	end := bytes.LastIndexByte(news, '\n') + 1
	l.at += end
	for line := range strings.Lines(string(news[:end])) {
		l.lines++
		if strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") || strings.Contains(line, "DATA RACE") {
			r.t.Errorf("%s: the daemon crashed: %s", n.Name, line)
		}
		found := message.FindStringSubmatch(line)
		if found == nil || found[1] == "INFO" || found[1] == "DEBUG" {
			continue
		}
		if l.warns == nil {
			l.warns = map[string]int{}
		}
		l.warns[found[1]+" "+found[2]]++
		if found[1] == "ERROR" && !slices.ContainsFunc(expected, func(e *regexp.Regexp) bool { return e.MatchString(line) }) {
			r.t.Errorf("%s: an error that is not expected: %s", n.Name, line)
		}
	}
}

// print tells how often what was logged.
func (l *logReader) print(name string) {
	fmt.Printf("  %s logged %d lines;", name, l.lines)
	for _, text := range sortedKeys(l.warns) {
		fmt.Printf(" %d times %s;", l.warns[text], text)
	}
	fmt.Println()
}
