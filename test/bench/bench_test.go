// Tests of the command line, the catalogue and what is read from iperf3, /proc and the wire.

package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseOptions_RefusesWhatCannotBe(t *testing.T) {
	for _, c := range []struct{ args, complaint string }{
		{"-underlay wifi", "wifi"},
		{"-rounds 0", "above zero"},
		{"-uid 0", "unprivileged"},
		{"-rows overlay-tpc", "overlay-tpc"},
		{"overlay-tcp", "unexpected"},
	} {
		_, err := parseOptions(strings.Fields(c.args), io.Discard)
		if err == nil || !strings.Contains(err.Error(), c.complaint) {
			t.Errorf("%s: got %v, want a complaint about %s", c.args, err, c.complaint)
		}
	}
}

func TestOptions_ChooseRowsByPrefix(t *testing.T) {
	rowsOf := func(rows string) []string {
		o, err := parseOptions([]string{"-rows", rows}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		var chosen []string
		for _, e := range o.experiments() {
			for _, r := range e.rows {
				if o.wants(r.name) {
					chosen = append(chosen, r.name)
				}
			}
		}
		return chosen
	}
	for rows, want := range map[string][]string{
		"overlay-tcp-4":        {"overlay-tcp-4"},
		"cpu-per-gb":           {"cpu-per-gb", "cpu-per-gb-machine"},
		"nat-conns, same-node": {"nat-conns-16", "nat-conns-1", "same-node-tcp"},
		"overlay-udp-64-gso":   {"overlay-udp-64-gso", "overlay-udp-64-gso-at-2x"},
	} {
		if got := rowsOf(rows); !slices.Equal(got, want) {
			t.Errorf("%q: got %v, want %v", rows, got, want)
		}
	}
}

func TestCatalogue_NamesEveryRowOnceWithItsPeers(t *testing.T) {
	seen := map[string]bool{}
	for _, e := range catalogue {
		for _, r := range e.rows {
			if seen[r.name] || r.unit == "" || r.about == "" {
				t.Errorf("row %q is there twice, or without unit or meaning", r.name)
			}
			seen[r.name] = true
			if !slices.Contains(e.peers, peerOurs) {
				t.Errorf("row %q is not about rootless-ovl", r.name)
			}
			if !slices.Equal(only(e.baselines, e.peers), e.baselines) {
				t.Errorf("row %q: a baseline of %v is not among the peers %v", r.name, e.baselines, e.peers)
			}
			if e.wanted > 0 && len(e.baselines) == 0 {
				t.Errorf("row %q: a ratio is wanted, and to nothing", r.name)
			}
		}
	}
	for _, name := range []string{
		"overlay-tcp-1", "overlay-tcp-1-reverse", "overlay-tcp-4", "overlay-udp-1400", "overlay-udp-64", "overlay-udp-1400-gso",
		"overlay-udp-64-gso", "overlay-rtt-p50", "overlay-rtt-p99", "egress-tcp-up", "egress-tcp-down", "egress-tcp-4", "nat-conns-16",
		"nat-conns-1", "cpu-per-gb", "rss-peak", "attach-p50", "same-node-tcp", "rmem-212992", "podman-run", "docker-run",
		"stock-vxlan-tcp-1", "stock-vxlan-tcp-1-reverse", "stock-vxlan-tcp-4", "stock-vxlan-tcp-4-reverse",
	} {
		if !seen[name] {
			t.Errorf("row %q is gone", name)
		}
	}
}

func TestParseIperf_ReadsWhatTheReceiverSaw(t *testing.T) {
	for _, c := range []struct {
		name, json string
		want       tcpResult
		complaint  string
	}{
		{
			"a measurement", `{"intervals":[{"sum":{"bytes":1e9,"omitted":true}},{"sum":{"bytes":2e9}}],
			"end":{"sum_sent":{"retransmits":7,"bits_per_second":9e9},"sum_received":{"bits_per_second":8e9}}}`,
			tcpResult{gbits: 8, gigabytes: 3, retransmits: 7}, "",
		},
		{"an error", `{"start":{},"error":"unable to connect"}`, tcpResult{}, "unable to connect"},
		{"nothing moved", `{"end":{"sum_received":{"bits_per_second":0}}}`, tcpResult{}, "nothing"},
		{"no JSON", `iperf3: command not found`, tcpResult{}, "no JSON"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseIperf([]byte(c.json))
			if got != c.want || (err == nil) != (c.complaint == "") || err != nil && !strings.Contains(err.Error(), c.complaint) {
				t.Errorf("got %v %v, want %v %q", got, err, c.want, c.complaint)
			}
		})
	}
}

func TestParseCPU_ReadsProc(t *testing.T) {
	stat := "42 (a (strange) name) S 1 42 42 0 -1 4194560 100 0 0 0 150 250 9 9 20 0 1 0 100 0 0"
	if got, err := parseProcessCPU(stat); err != nil || got != 4*time.Second {
		t.Errorf("process: got %v %v, want 4s", got, err)
	}
	if _, err := parseProcessCPU("42 (name) S 1"); err == nil {
		t.Error("process: a line that is too short passed")
	}
	if got, err := parseMachineCPU("cpu  100 20 30 9999 50 7 3 1 0 0\ncpu0 1 1 1 1 1 1 1\n"); err != nil || got != 1600*time.Millisecond {
		t.Errorf("machine: got %v %v, want 1.6s", got, err)
	}
	if _, err := parseMachineCPU("intr 1 2 3"); err == nil {
		t.Error("machine: another line passed")
	}
	if got, err := statusKB("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n", "VmRSS"); err != nil || got != 1<<20 {
		t.Errorf("memory: got %v %v, want 1 MiB", got, err)
	}
}

func TestIsEchoReply_TakesOnlyTheTargetsAnswer(t *testing.T) {
	target := netip.MustParseAddr("192.0.2.9")
	request := echoRequest(7, 1)
	if sum := uint32(0x0800) + 7 + 1 + uint32(binary.BigEndian.Uint16(request[2:])); sum != 0xffff {
		t.Errorf("the request's sum is %#x, want 0xffff", sum)
	}
	reply := append([]byte{0x46, 23: 0}, 0, 0, 0xf7, 0xf7, 0, 7, 0, 1) // with 4 bytes of options
	copy(reply[12:], target.AsSlice())
	if !isEchoReply(reply, target, request) {
		t.Error("the answer was not taken for one")
	}
	for name, change := range map[string]func([]byte) []byte{
		"a request":      func(b []byte) []byte { b[24] = 8; return b },
		"another source": func(b []byte) []byte { b[15]++; return b },
		"another ping":   func(b []byte) []byte { b[29]++; return b },
		"cut":            func(b []byte) []byte { return b[:30] },
		"empty":          func([]byte) []byte { return nil },
	} {
		if isEchoReply(change(bytes.Clone(reply)), target, request) {
			t.Errorf("%s was taken for the answer", name)
		}
	}
}

func TestSegmentSize_ReadsTheControlMessage(t *testing.T) {
	message := func(level, kind int32, size uint32) []byte {
		b := binary.NativeEndian.AppendUint64(nil, 20)
		b = binary.NativeEndian.AppendUint32(b, uint32(level))
		b = binary.NativeEndian.AppendUint32(b, uint32(kind))
		return append(binary.NativeEndian.AppendUint32(b, size), 0, 0, 0, 0)
	}
	for _, c := range []struct {
		name    string
		control []byte
		want    uint64
	}{
		{"UDP_GRO", message(unix.SOL_UDP, unix.UDP_GRO, 1400), 1400},
		{"another option", message(unix.SOL_UDP, unix.UDP_SEGMENT, 1400), 0},
		{"another level", message(unix.SOL_SOCKET, unix.UDP_GRO, 1400), 0},
		{"nothing", nil, 0},
		{"too short", message(unix.SOL_UDP, unix.UDP_GRO, 1400)[:18], 0},
	} {
		if got := segmentSize(c.control); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}
