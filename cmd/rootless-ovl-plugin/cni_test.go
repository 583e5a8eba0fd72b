// cni: standard output is the engine's, and the exit status too.

package main

import (
	"encoding/json"
	"testing"
)

func TestCNI_AnswersOnStandardOutputAlone(t *testing.T) {
	const config = `{"cniVersion": "1.1.0", "name": "ovl", "type": "rootless-ovl"}`
	for _, tc := range []struct {
		name, command, config string
		serve                 bool
		status, code          int
	}{
		{"VERSION", "VERSION", `{"cniVersion": "1.0.0"}`, false, 0, 0},
		{"STATUS without a daemon", "STATUS", config, false, exitFailed, 51},
		{"DEL without a daemon", "DEL", config, false, 0, 0},
		{"DEL of what is not there", "DEL", config, true, 0, 0},
		{"no command", "", config, true, exitFailed, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			if tc.serve {
				b.serve(&fakeDaemon{})
			}
			t.Setenv("CNI_COMMAND", tc.command)
			t.Setenv("CNI_CONTAINERID", "abc")
			t.Setenv("CNI_IFNAME", "eth0")
			if status := b.run(tc.config, "cni"); status != tc.status {
				t.Errorf("exit status %d, %s", status, b.out.String())
			}
			if tc.command == "DEL" {
				if b.out.Len() > 0 {
					t.Errorf("standard output has %q", b.out.String())
				}
				return
			}
			var answer struct {
				Code int `json:"code"`
			}
			if err := json.Unmarshal(b.out.Bytes(), &answer); err != nil || answer.Code != tc.code { // one document, and no other
				t.Errorf("%v, %s", err, b.out.String())
			}
		})
	}
}
