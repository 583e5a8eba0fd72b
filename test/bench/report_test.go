// Tests of the report: table, JSON, document.

package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// exampleBench has two rounds of two experiments, and a third row that one peer has not.
func exampleBench() *bench {
	b := &bench{options: options{rows: "overlay-tcp-1,cpu-per-gb,same-node", rounds: 2, underlay: underlayVeth}, values: map[key]*series{}, begin: time.Now()}
	for k, values := range map[key]series{
		{"overlay-tcp-1", underlayVeth, peerBare}:         {60, 62},
		{"overlay-tcp-1", underlayVeth, peerVXLAN}:        {40, 20},
		{"overlay-tcp-1", underlayVeth, peerOurs}:         {18, 19},
		{"cpu-per-gb", underlayVeth, peerOurs}:            {0.5, 0.5},
		{"same-node-tcp", underlayVeth, peerBridge}:       {50, 50},
		{"same-node-tcp", underlayVeth, peerOurs}:         {25, 30},
		{"overlay-tcp-1", underlayNIC, peerOurs}:          {1, 1}, // not asked for
		{"overlay-tcp-1-reverse", underlayVeth, peerOurs}: {},     // failed in every round
	} {
		b.values[k] = &values
	}
	b.missing = []string{"nebula: not installed: " + installLine("nebula")}
	return b
}

var exampleHeader = header{
	Commit: "abc1234", Kernel: "6.18.0", CPUs: 2, CPU: "Example CPU", MemoryMB: 4096, When: "2026-01-02 03:04 UTC", Rounds: 2,
	Command: "make bench", Versions: map[string]string{"go": "go1.26.8", "iperf3": "3.12"},
}

func exampleReport() *report {
	r := exampleBench().report(exampleHeader)
	r.Seconds = 12
	return r
}

func TestReport_IsReadable(t *testing.T) {
	want := `make bench: commit abc1234, 2026-01-02 03:04 UTC, 12 s
Machine: 2 CPUs (Example CPU), 4096 MB, Linux 6.18.0
Versions: go go1.26.8, iperf3 3.12
Median (lowest-highest) of 2 rounds; the last columns are rootless-ovl's ratio, the median of those within each round.

Underlay veth

  row            unit      bare              kernel-vxlan      rootless-ovl      of bare  of kernel-vxlan
  overlay-tcp-1  Gbit/s    61.0 (60.0-62.0)  30.0 (20.0-40.0)  18.5 (18.0-19.0)  0.303    0.700
  cpu-per-gb     CPU s/GB  -                 -                 0.500             -        -

  row            unit    kernel-bridge  rootless-ovl      of kernel-bridge
  same-node-tcp  Gbit/s  50.0           27.5 (25.0-30.0)  0.550

Missing: nebula: not installed: sudo apt-get install -y --no-install-recommends nebula
`
	if diff := cmp.Diff(want, exampleReport().text()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestReport_SaysWhatIsWanted(t *testing.T) {
	b := &bench{options: options{rows: "stock-vxlan-tcp-1", rounds: 2, underlay: underlayNIC}, values: map[key]*series{}, begin: time.Now()}
	for k, values := range map[key]series{
		{"stock-vxlan-tcp-1", underlayNIC, peerVXLAN}:            {8, 8},
		{"stock-vxlan-tcp-1", underlayNIC, peerOurs}:             {5, 7},
		{"stock-vxlan-tcp-1-retransmits", underlayNIC, peerOurs}: {3, 3},
	} {
		b.values[k] = &values
	}
	want := `  row                            unit      kernel-vxlan  rootless-ovl      of kernel-vxlan  wanted
  stock-vxlan-tcp-1              Gbit/s    8.00          6.00 (5.00-7.00)  0.750            0.500
  stock-vxlan-tcp-1-retransmits  segments  -             3.00              -                -
`
	if got := b.report(exampleHeader).text(); !strings.HasSuffix(got, "\n\n"+want) {
		t.Errorf("got\n%s\nwant at its end\n%s", got, want)
	}
}

func TestReport_IsJSONThatProgramsCanRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "results", "latest.json")
	if err := exampleReport().writeJSON(file); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	type row struct {
		Row, Underlay, Peer, Unit string
		Median, Min, Max          float64
		Ratio                     map[string]float64
	}
	var got struct {
		Commit, Kernel string
		CPUs           int
		Rows           []row
		Missing        []string
		Failed         []string
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if got.Commit != "abc1234" || got.Kernel != "6.18.0" || got.CPUs != 2 || len(got.Rows) != 6 || len(got.Missing) != 1 {
		t.Errorf("got %+v", got)
	}
	if !strings.Contains(string(text), `"failed": []`) {
		t.Error("no failures must be an empty list")
	}
	want := row{"overlay-tcp-1", "veth", "rootless-ovl", "Gbit/s", 18.5, 18, 19, map[string]float64{"bare": (18.0/60 + 19.0/62) / 2, "kernel-vxlan": 0.7}}
	if diff := cmp.Diff(want, got.Rows[2], cmp.Comparer(func(a, b float64) bool { return a-b < 1e-9 && b-a < 1e-9 })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestReport_GoesBetweenTheMarkersOfTheDocument(t *testing.T) {
	file := filepath.Join(t.TempDir(), "performance.md")
	document := "# Performance\n\n" + markBegin + "\nold\n" + markEnd + "\n\nWhat limits each row.\n"
	if err := os.WriteFile(file, []byte(document), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := checkMarkers(file); err != nil {
		t.Fatal(err)
	}
	for range 2 { // writing again changes nothing
		if err := exampleReport().writeDocs(file); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := "# Performance\n\n" + markBegin + `

- make bench: commit abc1234, 2026-01-02 03:04 UTC, 12 s
- Machine: 2 CPUs (Example CPU), 4096 MB, Linux 6.18.0
- Versions: go go1.26.8, iperf3 3.12
- Median (lowest-highest) of 2 rounds; the last columns are rootless-ovl's ratio, the median of those within each round.
- Missing: nebula: not installed: sudo apt-get install -y --no-install-recommends nebula

### Underlay veth

| row | unit | bare | kernel-vxlan | rootless-ovl | of bare | of kernel-vxlan |
| --- | --- | --- | --- | --- | --- | --- |
| overlay-tcp-1 | Gbit/s | 61.0 (60.0-62.0) | 30.0 (20.0-40.0) | 18.5 (18.0-19.0) | 0.303 | 0.700 |
| cpu-per-gb | CPU s/GB | - | - | 0.500 | - | - |

| row | unit | kernel-bridge | rootless-ovl | of kernel-bridge |
| --- | --- | --- | --- | --- |
| same-node-tcp | Gbit/s | 50.0 | 27.5 (25.0-30.0) | 0.550 |

` + markEnd + "\n\nWhat limits each row.\n"
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestCheckMarkers_WantsAPlaceForTheTable(t *testing.T) {
	for name, document := range map[string]string{
		"none": "# Performance\n", "only begin": markBegin, "only end": markEnd, "wrong order": markEnd + markBegin,
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "performance.md")
			if err := os.WriteFile(file, []byte(document), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := checkMarkers(file); !errors.Is(err, errNoMarkers) {
				t.Errorf("got %v, want %v", err, errNoMarkers)
			}
		})
	}
}

func TestNumber_HasThreeDigitsThatMatter(t *testing.T) {
	for f, want := range map[float64]string{
		0: "0", 0.0042: "0.00420", 0.5: "0.500", 1.005: "1.00", 12.34: "12.3", 123.4: "123", 123456: "123456", -2.5: "-2.50", 1e-9: "0.000000",
	} {
		if got := number(f); got != want {
			t.Errorf("%v: got %s, want %s", f, got, want)
		}
	}
}
