// docker-opts: what flannel's script writes, for the same flags.

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const sampleSubnetEnv = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"

func subnetFile(t *testing.T, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "subnet.env")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// The first five are the cases of flannel's dist/mk_docker_opts_test.go; the others were read off the script.
func TestDockerOpts_PrintsWhatFlannelsScriptWrites(t *testing.T) {
	const (
		bip  = `DOCKER_OPT_BIP="--bip=10.1.74.1/24"` + "\n"
		masq = `DOCKER_OPT_IPMASQ="--ip-masq=true"` + "\n"
		mtu  = `DOCKER_OPT_MTU="--mtu=1472"` + "\n"
		all  = `=" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"` + "\n"
	)
	masqueraded := strings.Replace(sampleSubnetEnv, "false", "true", 1)
	for _, tt := range []struct {
		name, args, file string
		env              [][2]string
		want             string
	}{
		{"everything", "", sampleSubnetEnv, nil, bip + masq + mtu + "DOCKER_OPTS" + all},
		{"individual", "-i", sampleSubnetEnv, nil, bip + masq + mtu},
		{"combined", "-c", sampleSubnetEnv, nil, "DOCKER_OPTS" + all},
		{"another key", "-k CUSTOM_KEY", sampleSubnetEnv, nil, bip + masq + mtu + "CUSTOM_KEY" + all},
		{"without masquerading", "-m", sampleSubnetEnv, nil, bip + mtu + `DOCKER_OPTS=" --bip=10.1.74.1/24 --mtu=1472"` + "\n"},
		{"both", "-ic", sampleSubnetEnv, nil, bip + masq + mtu + "DOCKER_OPTS" + all},
		{"several letters", "-cmk CUSTOM_KEY", sampleSubnetEnv, nil, `CUSTOM_KEY=" --bip=10.1.74.1/24 --mtu=1472"` + "\n"},
		{"the node masquerades", "-c", masqueraded, nil, `DOCKER_OPTS=" --bip=10.1.74.1/24 --ip-masq=false --mtu=1472"` + "\n"},
		{"no network", "-c", strings.Replace(sampleSubnetEnv, "FLANNEL_NETWORK=10.1.0.0/16\n", "", 1), nil, "DOCKER_OPTS" + all},
		{"a subnet alone", "", "FLANNEL_SUBNET=10.1.74.1/24\n", nil, bip + `DOCKER_OPTS=" --bip=10.1.74.1/24"` + "\n"},
		{"options before", "-c", sampleSubnetEnv, [][2]string{{"DOCKER_OPTS", "--debug"}}, `DOCKER_OPTS="--debug  --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"` + "\n"},
		{"options of others", "", sampleSubnetEnv, [][2]string{{"DOCKER_OPT_LABEL", "--label=a"}, {"DOCKER_OPT_MTU", "--mtu=9000"}},
			bip + masq + `DOCKER_OPT_LABEL="--label=a"` + "\n" + mtu + `DOCKER_OPTS=" --bip=10.1.74.1/24 --ip-masq=true --label=a --mtu=1472"` + "\n"},
		{"quotes", "-c", sampleSubnetEnv, [][2]string{{"DOCKER_OPTS", `--label="$a"`}}, `DOCKER_OPTS="--label=\"\$a\"  --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"` + "\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t)
			for _, v := range tt.env {
				t.Setenv(v[0], v[1])
			}
			args := append([]string{"docker-opts", "-f", subnetFile(t, tt.file)}, strings.Fields(tt.args)...)
			if got := b.must(args...); got != tt.want {
				t.Errorf("got\n%swant\n%s", got, tt.want)
			}
			out := filepath.Join(t.TempDir(), "docker_opts.env")
			if got := b.must(append(args, "-d", out)...); got != "" {
				t.Errorf("with -d it prints %q", got)
			}
			if got, err := os.ReadFile(out); err != nil || string(got) != tt.want {
				t.Errorf("file, %v:\n%swant\n%s", err, got, tt.want)
			}
		})
	}
}

func TestDockerOpts_ReadsTheNodesOwnFile(t *testing.T) {
	b := newBench(t)
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "subnet.env"), []byte(sampleSubnetEnv), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := b.must("docker-opts", "-i"); !strings.Contains(got, "10.1.74.1/24") {
		t.Errorf("without a daemon: %q", got)
	}
	b.daemon.status.SubnetEnv = subnetFile(t, strings.ReplaceAll(sampleSubnetEnv, "10.1.74.", "10.1.75."))
	b.serve()
	if got := b.must("docker-opts", "-i"); !strings.Contains(got, "10.1.75.1/24") {
		t.Errorf("with a daemon that writes elsewhere: %q", got)
	}
}

func TestDockerOpts_IsAnObjectForPrograms(t *testing.T) {
	b := newBench(t)
	var got map[string]string
	if err := json.Unmarshal([]byte(b.must("docker-opts", "-o", "json", "-f", subnetFile(t, sampleSubnetEnv))), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 4 || got["DOCKER_OPT_BIP"] != "--bip=10.1.74.1/24" || got["DOCKER_OPTS"] != " --bip=10.1.74.1/24 --ip-masq=true --mtu=1472" {
		t.Errorf("%q", got)
	}
}

func TestDockerOpts_RefusesWhatDockerCouldNotUse(t *testing.T) {
	b := newBench(t)
	code := b.run("docker-opts")
	b.checkError(code, 1, "subnet.env", "rootless-ovl up", "--subnet-file")
	code = b.run("docker-opts", "-f", subnetFile(t, "FLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"))
	b.checkError(code, 1, "no FLANNEL_SUBNET")
	code = b.run("docker-opts", "-f", subnetFile(t, "FLANNEL_NETWORK=10.1.0.0/16\n"))
	b.checkError(code, 1, "no FLANNEL_SUBNET")
	code = b.run("docker-opts", "-f", subnetFile(t, "FLANNEL_SUBNET=; rm -r ~\n"))
	b.checkError(code, 1, "subnet.env", "line 1")
	code = b.run("docker-opts", "-k", "a b")
	b.checkError(code, 2, "--key", `"a b"`)
	code = b.run("docker-opts", "-o", "json", "-d", "x")
	b.checkError(code, 2, "--docker-env")
}
