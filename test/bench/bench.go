// This file runs the experiments, round by round, and collects what they give.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// key is a cell of the report.
type key struct{ row, underlay, peer string }

// bench is one run. One goroutine uses it.
type bench struct {
	options
	dir     string
	log     io.Writer // progress
	values  map[key]*series
	missing []string // peers that are not installed, with the remedy
	notes   []string
	failed  []string
	begin   time.Time
}

// note adds a remark to the report.
func (b *bench) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintf(b.log, "note: %s\n", text)
	b.notes = append(b.notes, text)
}

// fail adds a failure to the report.
func (b *bench) fail(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	fmt.Fprintf(b.log, "FAILED: %s\n", text)
	b.failed = append(b.failed, text)
}

// errFailures is a run in which a measurement failed; the report says which.
var errFailures = errors.New("not everything could be measured: see the failures above")

// run measures and reports. The report is there also when something failed, or the time was up; nil only when nothing could begin.
func (b *bench) run(ctx context.Context) (*report, error) {
	b.values = map[key]*series{}
	b.begin = time.Now()
	header, err := b.describe(ctx)
	if err != nil {
		return nil, err
	}
	for i, underlay := range b.underlays() {
		if err := b.runUnderlay(ctx, underlay, i == 0); err != nil && ctx.Err() == nil {
			b.fail("underlay %s: %v", underlay, err)
		}
	}
	if ctx.Err() != nil {
		b.fail("stopped after %v: the rows that are not there were not measured", time.Since(b.begin).Round(time.Second))
	}
	r := b.report(header)
	if len(b.failed) > 0 {
		return r, errFailures
	}
	return r, nil
}

// runUnderlay runs the experiments over one underlay; first says that it is the first, whose turn it is for those that run once.
func (b *bench) runUnderlay(ctx context.Context, underlay string, first bool) error {
	l, err := newLab(ctx, underlay, b.dir, b.dir+"/rootless-ovl", b.uid, b.log)
	defer l.close()
	if err != nil {
		return err
	}
	for _, e := range b.experiments() {
		if e.once && !first || ctx.Err() != nil {
			continue
		}
		if err := b.runExperiment(ctx, l, e); err != nil && ctx.Err() == nil {
			b.fail("%s over %s: %v", e.rows[0].name, underlay, err)
		}
	}
	return nil
}

// runExperiment measures every path in every round, in an order that rotates.
func (b *bench) runExperiment(ctx context.Context, l *lab, e experiment) error {
	var paths []*path
	var err error
	if e.open != nil {
		paths, err = e.open(ctx, b, l)
	} else {
		paths, err = b.paths(ctx, l, e.peers, e.path)
	}
	if err != nil {
		return err
	}
	for round := range b.rounds {
		for i := range paths {
			p := paths[(i+round)%len(paths)]
			if ctx.Err() != nil {
				return ctx.Err()
			}
			values, err := e.measure(ctx, b, l, p)
			if err != nil {
				if ctx.Err() == nil {
					b.fail("%s over %s, %s, round %d: %v", e.rows[0].name, l.underlay, p.peer, round+1, err)
				}
				continue
			}
			b.keep(e, l.underlay, p.peer, round, values)
		}
	}
	return nil
}

// paths starts the peers and picks a path of each; a peer that does not start is said once and left out.
func (b *bench) paths(ctx context.Context, l *lab, peers []string, pick func(network) *path) ([]*path, error) {
	var paths []*path
	for _, name := range peers {
		_, known := l.peers[name]
		n, err := l.peer(ctx, name)
		switch {
		case errors.Is(err, errMissing):
			if text := err.Error(); !slices.Contains(b.missing, text) {
				fmt.Fprintf(b.log, "MISSING: %s\n", text)
				b.missing = append(b.missing, text)
			}
		case err != nil && ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			if !known {
				b.fail("over %s: %v", l.underlay, err)
			}
		default:
			paths = append(paths, pick(n))
		}
	}
	if len(paths) == 0 {
		return nil, errors.New("no peer to measure")
	}
	return paths, nil
}

// keep stores the readings of rows that are asked for.
func (b *bench) keep(e experiment, underlay, peer string, round int, values readings) {
	said := map[string][]string{} // by peer
	for _, r := range e.rows {
		if !b.wants(r.name) {
			continue
		}
		for at, value := range values {
			if at.row != r.name {
				continue
			}
			k := key{r.name, underlay, peer}
			if at.peer != "" {
				k.peer = at.peer
			}
			if b.values[k] == nil {
				b.values[k] = new(series)
			}
			b.values[k].set(round, value)
			said[k.peer] = append(said[k.peer], fmt.Sprintf("%s %s %s", k.row, number(value), r.unit))
		}
	}
	for _, peer := range slices.Sorted(maps.Keys(said)) {
		fmt.Fprintf(b.log, "%4.0fs  %-8s round %d  %-18s %s\n", time.Since(b.begin).Seconds(), underlay, round+1, peer, strings.Join(said[peer], ", "))
	}
}

// report puts the results in the catalogue's order.
func (b *bench) report(h header) *report {
	r := &report{header: h, Missing: b.missing, Notes: b.notes, Failed: b.failed, Seconds: time.Since(b.begin).Seconds()}
	for _, underlay := range b.underlays() {
		for _, e := range b.experiments() {
			for _, row := range e.rows {
				if b.wants(row.name) {
					r.Rows = append(r.Rows, b.resultsOf(e, row, underlay)...)
				}
			}
		}
	}
	return r
}

// resultsOf are a row's results, a peer each.
func (b *bench) resultsOf(e experiment, row row, underlay string) []result {
	var results []result
	for _, peer := range e.peers {
		values := b.values[key{row.name, underlay, peer}]
		if values == nil {
			continue
		}
		s, ok := values.summary()
		if !ok {
			continue
		}
		res := result{
			Row: row.name, Underlay: underlay, Peer: peer, Unit: row.unit, Median: s.median, Min: s.min, Max: s.max,
			Ratio: map[string]float64{}, Values: values.valid(),
		}
		if peer == peerOurs && row.name == e.rows[0].name && underlay == underlayNIC {
			res.Wanted = e.wanted
		}
		for _, base := range e.baselines {
			baseline := b.values[key{row.name, underlay, base}]
			if baseline == nil {
				continue
			}
			if ratio, ok := values.ratio(*baseline); ok {
				res.Ratio[base] = ratio
			}
		}
		results = append(results, res)
	}
	return results
}
