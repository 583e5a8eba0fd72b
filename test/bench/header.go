// This file describes the machine and the versions of what is measured.

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// header is what a result depends on.
type header struct {
	Commit   string            `json:"commit"`
	Kernel   string            `json:"kernel"`
	CPUs     int               `json:"cpus"`
	CPU      string            `json:"cpu"`
	MemoryMB int               `json:"memory_mb"`
	When     string            `json:"when"`
	Rounds   int               `json:"rounds"`
	Command  string            `json:"command"`
	Versions map[string]string `json:"versions"`
}

func (b *bench) describe(ctx context.Context) (header, error) {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return header{}, err
	}
	h := header{
		Commit: b.commit, Kernel: unix.ByteSliceToString(uname.Release[:]), CPUs: runtime.NumCPU(), CPU: runtime.GOARCH,
		When: time.Now().UTC().Format("2006-01-02 15:04 UTC"), Rounds: b.rounds, Command: b.commandLine(), Versions: map[string]string{"go": runtime.Version()},
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if model := field(string(text), "model name"); model != "" {
			h.CPU = model
		}
	}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		if size, err := statusKB(string(text), "MemTotal"); err == nil {
			h.MemoryMB = int(size / 1e6)
		}
	}
	for name, args := range map[string][]string{
		peerOurs: {b.dir + "/rootless-ovl", "version"}, peerNebula: {"nebula", "-version"}, "iperf3": {"iperf3", "--version"},
		peerSlirp: {"slirp4netns", "--version"}, peerPasta: {"dpkg-query", "--show", "--showformat=${Version}", "passt"},
	} {
		if version := firstLine(ctx, args); version != "" {
			h.Versions[name] = version
		}
	}
	return h, nil
}

// commandLine is how to do the same again.
func (b *bench) commandLine() string {
	line := "make bench"
	for _, v := range []struct{ name, value, usual string }{
		{"ROWS", b.rows, ""}, {"UNDERLAY", b.underlay, ""}, {"ROUNDS", fmt.Sprint(b.rounds), "3"},
	} {
		if v.value != v.usual {
			line += " " + v.name + "=" + v.value
		}
	}
	if b.writeDocs {
		line += " ARGS=-write-docs"
	}
	return line
}

// firstLine is what a program prints first, without its own name; empty when it does not run.
func firstLine(ctx context.Context, args []string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	for _, prefix := range []string{"Version:", "iperf", "slirp4netns version", "rootless-ovl"} {
		line = strings.TrimSpace(strings.TrimPrefix(line, prefix))
	}
	return line
}

// field is the first value of a name in text of "name : value" lines.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if n, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(n) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
