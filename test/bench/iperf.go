// This file runs iperf3 between two ends.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// iperfPort is iperf3's own.
const iperfPort = 5201

// warmSeconds are sent before a TCP measurement and do not count.
const warmSeconds = 1

// tcpLoad is what iperf3 is to send from a to b, or in reverse.
type tcpLoad struct {
	streams int
	reverse bool
	seconds int
	port    int // 0: iperfPort
}

// tcpResult is what iperf3 says.
type tcpResult struct {
	gbits       float64 // per second, as the receiver saw it
	gigabytes   float64 // moved in all, with those that do not count
	retransmits float64 // of the sender, in the time that counts
}

// iperf runs one measurement. The server ends with it.
func iperf(ctx context.Context, a, b end, load tcpLoad) (tcpResult, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(load.seconds+warmSeconds+10)*time.Second)
	defer cancel()
	if load.port == 0 {
		load.port = iperfPort
	}
	port := strconv.Itoa(load.port)
	stop, err := iperfServer(ctx, b, port)
	if err != nil {
		return tcpResult{}, err
	}
	defer stop()
	args := []string{"--json", "--client", b.addr.String(), "--port", port, "--connect-timeout", "3000",
		"--time", strconv.Itoa(load.seconds), "--omit", strconv.Itoa(warmSeconds), "--parallel", strconv.Itoa(load.streams)}
	if load.reverse {
		args = append(args, "--reverse")
	}
	out, err := a.output(exec.CommandContext(ctx, "iperf3", args...))
	result, parseErr := parseIperf([]byte(out))
	if parseErr != nil {
		return tcpResult{}, errors.Join(parseErr, err)
	}
	return result, nil
}

// iperfServer starts a server for one measurement and waits until it listens.
func iperfServer(ctx context.Context, at end, port string) (stop func(), err error) {
	cmd := exec.CommandContext(ctx, "iperf3", "--server", "--one-off", "--forceflush", "--port", port)
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := at.start(cmd); err != nil {
		return nil, fmt.Errorf("iperf3 server: %w", err)
	}
	lines := bufio.NewScanner(out)
	var said strings.Builder
	listens := false
	for !listens && lines.Scan() {
		said.WriteString(lines.Text() + "\n")
		listens = strings.Contains(lines.Text(), "Server listening")
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		_, _ = io.Copy(io.Discard, out)
	}()
	stop = func() {
		_ = cmd.Process.Kill() // it has ended by itself after a measurement
		<-drained
		_ = cmd.Wait()
	}
	if !listens {
		stop()
		return nil, fmt.Errorf("the iperf3 server in %s does not listen: %s", at.name, tail(said.String()))
	}
	return stop, nil
}

// parseIperf reads what `iperf3 --json` prints.
func parseIperf(b []byte) (tcpResult, error) {
	var r struct {
		Error     string `json:"error"`
		Intervals []struct {
			Sum struct {
				Bytes float64 `json:"bytes"`
			} `json:"sum"`
		} `json:"intervals"`
		End struct {
			Sent struct {
				Retransmits float64 `json:"retransmits"`
			} `json:"sum_sent"`
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return tcpResult{}, fmt.Errorf("iperf3 printed no JSON: %w", err)
	}
	if r.Error != "" {
		return tcpResult{}, fmt.Errorf("iperf3: %s", r.Error)
	}
	if r.End.Received.BitsPerSecond <= 0 {
		return tcpResult{}, errors.New("iperf3 moved nothing")
	}
	result := tcpResult{gbits: r.End.Received.BitsPerSecond / 1e9, retransmits: r.End.Sent.Retransmits}
	for _, i := range r.Intervals {
		result.gigabytes += i.Sum.Bytes / 1e9
	}
	return result, nil
}
