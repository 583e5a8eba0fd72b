// What people and programs read: tables, JSON names, errors and exit statuses.

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestCommands_PrintForPeople(t *testing.T) {
	tests := []struct {
		args []string
		want string
	}{
		{[]string{"ps"}, `
NAME  ADDRESS        INTERFACE  MAC                PID  NETNS                   AGE    PORTS                                                             POLICY                           PROBLEM
job7  10.213.7.3/24  ovl0       02:00:0a:d5:07:03  -    /run/user/1000/netns/x  5s     -                                                                 isolate, egress deny, host 5432  -
web   10.213.7.2/24  eth0       02:00:0a:d5:07:02  815  -                       3h10m  0.0.0.0:8080->80/tcp, [::]:8080->80/tcp, [::1]:53->53/udp (snat)  -                                its MTU is 1430
`},
		{[]string{"peers"}, `
SUBNET          PUBLIC IP   PORT   MTU   PATH MTU  BACKEND  KIND          NODE ID  HEARD  PROBLEM
10.213.9.0/24   192.0.2.9   18285  1472  1372      udp      rootless-ovl  fedc     9m0s   -
10.213.12.0/24  192.0.2.12  8285   1472  1472      udp      flannel       -        -      same public IP as ours
`},
		{[]string{"addresses"}, `
ADDRESS        OWNER        ATTACHMENT  AGE
10.213.7.2/24  docker/12ab  web         10m0s
10.213.7.9/24  -            -           9m0s
`},
		{[]string{"addresses", "--release", "10.213.7.9"}, "\nreleased 10.213.7.9\n"},
		{[]string{"status"}, `
State              ready
Network            10.213.0.0/16
Subnet             10.213.7.0/24
Gateway            10.213.7.1
Backend            udp, MTU 1472
Underlay           192.0.2.1 port 8285 on eth0
Store              embedded etcd on http://127.0.0.1:2379, prefix /coreos.com/network, connected for 10m0s
Attachments        2
Peers              1 (without an answer: 1, see rootless-ovl peers)
Node ID            0123456789abcdef0123456789abcdef
Subnet file        /run/user/1000/rootless-ovl/subnet.env
Daemon             version v1.2.3, pid 4711, up 10m0s
drops.ttl_exceeded 3
path_mtu.silent_peers 1
tap.reads          12
`},
		{[]string{"attach", "815", "--name", "web"}, "\n10.213.7.2/24\n"},
		{[]string{"detach", "web"}, "\ndetached web\n"},
		{[]string{"config", "get"}, `
{
  "Network": "10.213.0.0/16",
  "Backend": {
    "Type": "udp"
  }
}
`},
		{[]string{"config", "set", `{"Network":"10.5.0.0/16"}`}, "\nnetwork config written; nodes read it when they start\n"},
	}
	b := newBench(t).serve()
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			got := b.must(tt.args...)
			if tt.args[0] == "status" { // the first column is as wide as the longest counter
				got, tt.want = squeeze(got), squeeze(tt.want)
			}
			if want := strings.TrimPrefix(tt.want, "\n"); strings.TrimLeft(got, "\n") != strings.TrimLeft(want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// squeeze makes one blank of many.
func squeeze(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	for i, l := range lines {
		lines[i] = strings.Join(strings.Fields(l), " ")
	}
	return strings.Join(lines, "\n")
}

func TestStatus_SaysWhatIsNotThere(t *testing.T) {
	b := newBench(t).serve()
	b.daemon.status = api.Status{
		State: api.StateWaitingForStore, Since: start, Ephemeral: true,
		Store: api.StoreStatus{Endpoints: []string{"http://192.0.2.5:2379"}, Prefix: "/p", Since: start, Error: "connection refused"},
	}
	got := b.must("status")
	for _, want := range []string{
		"State  waiting-for-store", "Network  -", "not connected for 10m0s: connection refused", "http://192.0.2.5:2379, prefix /p",
	} {
		if !strings.Contains(strings.Join(strings.Fields(got), " "), strings.Join(strings.Fields(want), " ")) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	if strings.Contains(got, "port 0") || strings.Contains(got, "MTU 0") {
		t.Errorf("zeroes are shown as if they were values:\n%s", got)
	}
}

func TestStatus_HasBothFamiliesInRowsOfTheirOwn(t *testing.T) {
	b := newBench(t).serve()
	b.daemon.status.Network6, b.daemon.status.Subnet6, b.daemon.status.Gateway6 = "fd00:5::/48", "fd00:5:0:7::/64", "fd00:5:0:7::1"
	stdout := b.must("status")
	for _, row := range []string{"Gateway", "Subnet", "Network"} {
		if v4 := regexp.MustCompile(`(?m)^` + row + `\s+\S+$`).FindString(stdout); v4 == "" || strings.Contains(v4, "fd00") {
			t.Errorf("row %s: %q", row, v4)
		}
		if !regexp.MustCompile(`(?m)^` + row + `6\s+fd00\S+$`).MatchString(stdout) {
			t.Errorf("no row %s6:\n%s", row, stdout)
		}
	}
}

func TestAttach_KeepsTheSentenceApartFromTheAddress(t *testing.T) {
	b := newBench(t).serve()
	b.must("attach", "815")
	if got := b.err.String(); got != "attached chosen: 10.213.7.2/24 on eth0, gateway 10.213.7.1\n" {
		t.Errorf("standard error: %q", got)
	}
	b.must("attach", "815", "-o", "json")
	if b.err.Len() != 0 {
		t.Errorf("with JSON, standard error: %q", &b.err)
	}
}

func TestAttach_AsksForWhatTheFlagsSay(t *testing.T) {
	b := newBench(t).serve()
	t.Chdir(t.TempDir())
	b.must("attach", "815", "--name", "web", "--ip", "10.213.7.9", "--ifname", "ovl0", "--mac", "02:00:00:00:00:09", "--no-default-route")
	b.must("attach", "--netns", "ns/x")
	b.must("attach", "./ns/y")
	b.must("attach", "--gateway", "816")
	b.must("attach", "817", "--isolate", "--allow-from", "10.213.7.0/24:80-81/tcp,[fd00::/64]:80", "--allow-from", "10.213.9.9", "--allow-to", "10.213.9.0/24",
		"--egress", "192.0.2.0/24,2001:db8::/32", "--host-access", "5432,8080,5432", "--host-access", "8080")
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	want := []api.AttachRequest{
		{PID: 815, Name: "web", Addr: "10.213.7.9", IfName: "ovl0", MAC: "02:00:00:00:00:09", NoDefaultRoute: true},
		{Netns: filepath.Join(wd, "ns/x")},
		{Netns: filepath.Join(wd, "ns/y")},
		{PID: 816, Gateway: true},
		{PID: 817, Policy: api.Policy{Isolate: true, AllowFrom: []string{"10.213.7.0/24:80-81/tcp", "[fd00::/64]:80", "10.213.9.9"}, AllowTo: []string{"10.213.9.0/24"},
			Egress: []string{"192.0.2.0/24", "2001:db8::/32"}, HostAccess: []int{5432, 8080}}},
	}
	if len(b.daemon.attached) != len(want) {
		t.Fatalf("asked for %+v", b.daemon.attached)
	}
	for i, got := range b.daemon.attached {
		if !reflect.DeepEqual(got, want[i]) {
			t.Errorf("asked for %+v, want %+v", got, want[i])
		}
	}
}

func TestCommands_PrintJSONWithStableNames(t *testing.T) {
	tests := []struct {
		args []string
		want string
	}{
		{[]string{"status"}, "addrs_free attachments backend counters ephemeral gateway interface mtu network node_id peers pid port public_ip runtime_dir sandbox since state state_dir store subnet subnet_file version"},
		{[]string{"ps"}, "addr default_route egress gateway host_access ifname isolate mac mtu name netns since"},
		{[]string{"peers"}, "backend last_heard mtu node_id path_mtu port public_ip stock subnet"},
		{[]string{"addresses"}, "addr attachment gateway owner since"},
		{[]string{"addresses", "--release", "10.213.7.9"}, "released"},
		{[]string{"attach", "815"}, "addr default_route gateway ifname mac mtu name pid since"},
		{[]string{"detach", "web"}, "detached"},
		{[]string{"config", "get"}, "Backend Network"},
		{[]string{"config", "set", `{"Network":"10.5.0.0/16"}`}, "Network"},
		{[]string{"version"}, "arch commit go_version modified os version"},
	}
	b := newBench(t).serve()
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			got := jsonNames(t, b.must(append(tt.args, "--output", "json")...))
			if strings.Join(got, " ") != tt.want {
				t.Errorf("names %q, want %s", got, tt.want)
			}
		})
	}
}

func TestLists_AreEmptyJSONArraysAndHeadings(t *testing.T) {
	b := newBench(t).serve()
	b.daemon.attachments, b.daemon.peers, b.daemon.addresses = nil, nil, nil
	for _, cmd := range []string{"ps", "peers", "addresses"} {
		if got := b.must(cmd, "-o", "json"); got != "[]\n" {
			t.Errorf("%s as JSON: %q", cmd, got)
		}
		if got := b.must(cmd); strings.Count(got, "\n") != 1 {
			t.Errorf("%s: %q, want the heading alone", cmd, got)
		}
	}
}

func TestVersion_NamesTheBuild(t *testing.T) {
	b := newBench(t)
	got := b.must("version")
	if flag := b.must("--version"); flag != got {
		t.Errorf("--version prints %q, version %q", flag, got)
	}
	if !strings.HasPrefix(got, "rootless-ovl ") || !strings.Contains(got, "go1.") || !strings.Contains(got, "/") {
		t.Errorf("%q", got)
	}
}

func TestErrors_AreOneLineWithARemedyAndAnExitStatus(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bad.json")
	if err := os.WriteFile(file, []byte(`{"Network":"10.0.0.0/31"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"frobnicate"}, 2, []string{`"frobnicate"`, "--help"}},
		{[]string{"status", "--colour"}, 2, []string{"--colour", "rootless-ovl status --help"}},
		{[]string{"status", "-o", "xml"}, 2, []string{`"xml"`, "text or json"}},
		{[]string{"status", "now"}, 2, []string{`"now"`}},
		{[]string{"attach"}, 2, []string{"neither a pid nor a netns path"}},
		{[]string{"attach", "1", "2"}, 2, []string{"at most 1"}},
		{[]string{"attach", "web"}, 2, []string{`"web" is not a pid`, "podman inspect"}},
		{[]string{"attach", "/x", "--netns", "/y"}, 2, []string{"both /x and --netns /y"}},
		{[]string{"attach", "5", "--gateway", "--ip", "10.213.7.3"}, 2, []string{"10.213.7.3", "whole subnet"}},
		{[]string{"attach", "5", "--gateway", "--isolate"}, 2, []string{"--isolate", "whole subnet"}},
		{[]string{"attach", "5", "--allow-from", "10.213.7.3/24"}, 2, []string{"--allow-from", "10.213.7.0/24"}},
		{[]string{"attach", "5", "--allow-to", "10.213.7.0/24:http"}, 2, []string{"--allow-to", `"http"`, "port"}},
		{[]string{"attach", "5", "--allow-from", ""}, 2, []string{"--allow-from is empty"}},
		{[]string{"attach", "5", "--egress", "deny,192.0.2.0/24"}, 2, []string{"--egress", "alone"}},
		{[]string{"attach", "5", "--egress", "none"}, 2, []string{"--egress", "none", "deny"}},
		{[]string{"attach", "5", "--host-access", "53"}, 2, []string{"--host-access", "resolver"}},
		{[]string{"attach", "5", "--host-access", "http"}, 2, []string{"--host-access", "http", "5432"}},
		{[]string{"attach", "5", "--host-access", "80,"}, 2, []string{"--host-access", `""`, "5432"}},
		{[]string{"attach", "5", "--host-access", "8000-8010"}, 2, []string{"--host-access", "8000-8010", "one by one"}},
		{[]string{"run", "--allow-from", "x", "--", "true"}, 2, []string{"--allow-from"}},
		{[]string{"attach", "0"}, 2, []string{`"0" is not a pid`}},
		{[]string{"attach", "+123"}, 2, []string{`"+123" is not a pid`}},
		{[]string{"attach", "--netns", "/proc/self/ns/net"}, 2, []string{"/proc/self/ns/net", "attach $$"}},
		{[]string{"attach", "5", "--name", ""}, 2, []string{"--name is empty"}},
		{[]string{"attach", "5", "--ip", ""}, 2, []string{"--ip is empty"}},
		{[]string{"run", "--name", "", "--", "true"}, 2, []string{"--name is empty"}},
		{[]string{"run", "--", ""}, 2, []string{"needs a command"}},
		{[]string{"detach", ""}, 2, []string{`""`, "neither a name nor a pid"}},
		{[]string{"detach", "+5"}, 2, []string{`"+5"`, "neither a name nor a pid"}},
		{[]string{"attch", "5"}, 2, []string{`"attch"`, "did you mean attach?"}},
		{[]string{"config", "get", "--etcd-endpoints", ""}, 2, []string{"--etcd-endpoints is empty"}},
		{[]string{"config", "get", "--etcd-endpoints", "ftp://x"}, 2, []string{"ftp://x", "http://"}},
		{[]string{"attach", "-5"}, 2, []string{"rootless-ovl attach --help"}},
		{[]string{"attach", "5", "--netns", "/x"}, 2, []string{"both a pid (5) and a netns path (/x)"}},
		{[]string{"attach", "5", "--ip", "10.213.7.300"}, 2, []string{"10.213.7.300", "IPv4"}},
		{[]string{"attach", "5", "--ip", "10.213.7.3/24"}, 2, []string{"without a length"}},
		{[]string{"attach", "5", "--ip", "fd00::1"}, 2, []string{"IPv4"}},
		{[]string{"attach", "5", "--mac", "nonsense"}, 2, []string{"nonsense"}},
		{[]string{"attach", "5", "--ifname", "much-too-long-name"}, 2, []string{"much-too-long-name", "15"}},
		{[]string{"attach", "5", "--name", "77"}, 2, []string{"taken for a pid"}},
		{[]string{"detach"}, 2, []string{"one name or pid", "ps"}},
		{[]string{"run"}, 2, []string{"needs a command", "--"}},
		{[]string{"run", "--ip", "x", "--", "true"}, 2, []string{`"x"`}},
		{[]string{"config"}, 2, []string{"config get"}},
		{[]string{"config", "set"}, 2, []string{"a file, - for standard input"}},
		{[]string{"config", "set", "/does/not/exist"}, 1, []string{"/does/not/exist", "no such file"}},
		{[]string{"config", "set", file}, 1, []string{file, "10.0.0.0/31"}},
		{[]string{"config", "set", "{}"}, 1, []string{"the given JSON", "Network"}},
		{[]string{"config", "set", "-"}, 1, []string{"standard input"}},
		{[]string{"config", "get", "--etcd-prefix", "/p"}, 2, []string{"--etcd-endpoints"}},
		{[]string{"config", "get", "--etcd-username", "u"}, 2, []string{envEtcdPassword}},
		{[]string{"config", "get", "--etcd-cafile", "ca.pem"}, 2, []string{"--etcd-endpoints"}},
	}
	b := newBench(t).serve()
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			code := b.run(tt.args...)
			b.checkError(code, tt.code, tt.says...)
			if b.out.Len() != 0 {
				t.Errorf("standard output: %q", &b.out)
			}
		})
	}
	if len(b.daemon.attached) != 0 || b.daemon.notes.String() != "" {
		t.Errorf("the daemon was asked: %v %v", b.daemon.attached, b.daemon.notes)
	}
}

// checkError holds that the last run ended with that status and one line on standard error that has all those texts.
func (b *bench) checkError(code, want int, says ...string) {
	b.t.Helper()
	if code != want {
		b.t.Errorf("exit status %d, want %d", code, want)
	}
	text := b.err.String()
	if !strings.HasPrefix(text, "rootless-ovl: ") || strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") {
		b.t.Errorf("standard error is not one line of ours: %q", text)
	}
	if strings.Contains(text, "Usage:") {
		b.t.Errorf("standard error has the usage: %q", text)
	}
	for _, s := range says {
		if !strings.Contains(text, s) {
			b.t.Errorf("%q does not say %q", text, s)
		}
	}
}

func TestClients_SayThatTheDaemonIsNotRunning(t *testing.T) {
	b := newBench(t)
	for _, args := range [][]string{
		{"status"}, {"ps"}, {"peers"}, {"addresses"}, {"addresses", "--release", "10.213.7.9"}, {"attach", "5"}, {"detach", "web"}, {"run", "--", "true"}, {"exec", "web", "--", "true"}, {"forward", "0", "web:80"}, {"config", "get"},
		{"config", "set", `{"Network":"10.5.0.0/16"}`},
	} {
		code := b.run(args...)
		b.checkError(code, 1, "the daemon is not running", b.dir+"/api.sock", "rootless-ovl up")
	}
	t.Setenv(envRuntimeDir, "")
	code := b.run("status")
	b.checkError(code, 1, "XDG_RUNTIME_DIR", "export XDG_RUNTIME_DIR=/run/user/$UID", "--runtime-dir")
	other := filepath.Join(b.dir, "other")
	code = b.run("status", "--runtime-dir", other)
	b.checkError(code, 1, other+"/api.sock")
}

func TestErrors_OfTheDaemonAreJSONToo(t *testing.T) {
	b := newBench(t).serve()
	b.daemon.err = api.Errorf(api.CodeInUse, "address 10.213.7.2 is taken by web:\nuse another")
	code := b.run("attach", "5", "-o", "json")
	b.checkError(code, 1, "rootless-ovl: address 10.213.7.2 is taken by web:; use another")
	var e api.Error
	if err := json.Unmarshal(b.out.Bytes(), &e); err != nil || e.Code != api.CodeInUse || !strings.Contains(e.Message, "taken by web") {
		t.Errorf("standard output %q: %+v, %v", &b.out, e, err)
	}

	code = b.run("attach", "5", "--ip", "x", "-o", "json")
	b.checkError(code, 2, `"x"`)
	if err := json.Unmarshal(b.out.Bytes(), &e); err != nil || e.Code != api.CodeInvalid {
		t.Errorf("standard output %q: %+v, %v", &b.out, e, err)
	}
}

func TestDirectories_FlagBeatsEnvironmentBeatsDefault(t *testing.T) {
	b := newBench(t)
	a := &app{world: b.world}
	t.Setenv(envRuntimeDir, "")
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	for _, step := range []struct {
		set  func()
		want string
	}{
		{func() {}, "/run/user/7/rootless-ovl"},
		{func() { t.Setenv(envRuntimeDir, "/env") }, "/env"},
		{func() { a.runtimeDir = "/flag" }, "/flag"},
	} {
		step.set()
		if got, err := a.runtime(); err != nil || got != step.want {
			t.Errorf("runtime directory %q, %v, want %s", got, err, step.want)
		}
	}
	t.Setenv("HOME", "/home/u")
	if got, err := a.state(); err != nil || got != "/home/u/.local/state/rootless-ovl" {
		t.Errorf("state directory %q, %v", got, err)
	}
	t.Setenv(envStateDir, "/env")
	if got, err := a.state(); err != nil || got != "/env" {
		t.Errorf("state directory %q, %v", got, err)
	}
}

func TestCompletion_OffersAttachmentsToDetach(t *testing.T) {
	b := newBench(t).serve()
	got := b.must("__complete", "detach", "")
	if !strings.HasPrefix(got, "job7\t10.213.7.3/24\nweb\t10.213.7.2/24\n") {
		t.Errorf("%q", got)
	}
	if got := b.must("__complete", "detach", "web", ""); strings.Contains(got, "job7") {
		t.Errorf("a second name is offered: %q", got)
	}
	b.daemon.err = api.Errorf(api.CodeInternal, "broken")
	if got := b.must("__complete", "detach", ""); !strings.HasPrefix(got, ":4") {
		t.Errorf("with a broken daemon: %q", got)
	}
	if got := b.must("__complete", "status", "--output", ""); !strings.HasPrefix(got, "text\njson\n") {
		t.Errorf("--output: %q", got)
	}
	for _, cmd := range []string{"up", "attach", "run", "doctor"} {
		if got := b.must("__complete", cmd, "--"); strings.Contains(got, "`") || !strings.Contains(got, "--runtime-dir\tdirectory of") {
			t.Errorf("flags of %s: %q", cmd, got)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if help := b.must("completion", shell, "--help"); strings.Contains(help, "brew") || !strings.Contains(help, completionFiles[shell]) {
			t.Errorf("help of completion %s:\n%s", shell, help)
		}
		if got := b.must("completion", shell); !strings.Contains(got, "rootless-ovl") {
			t.Errorf("completion %s: %d bytes", shell, len(got))
		}
	}
}

func TestPs_ShowsWhatEnginesCallThem(t *testing.T) {
	b := newBench(t).serve()
	id := strings.Repeat("0a1b", 16)
	b.daemon.attachments[0].Owner = "oci/" + id
	b.daemon.attachments = append(b.daemon.attachments, api.Attachment{Name: "netns-7", Inode: 4026532345, Owner: "cni/blue/" + id + "/eth0", Since: start})
	lines := strings.Split(squeeze(b.must("ps")), "\n")
	want := []string{"NAME ADDRESS INTERFACE MAC PID NETNS OWNER AGE", "/run/user/1000/netns/x oci/0a1b0a1b0a1b 5s", "815 - - 3h10m", "- net:[4026532345] cni/blue/0a1b0a1b0a1b/eth0 10m0s"}
	if len(lines) != len(want) {
		t.Fatalf("got %q", lines)
	}
	for i, w := range want {
		if !strings.Contains(lines[i], w) {
			t.Errorf("line %q, want %q in it", lines[i], w)
		}
	}
}

func TestRename_AsksForWhatItIsGiven(t *testing.T) {
	b := newBench(t).serve()
	for line, want := range map[string]string{
		"rename 815 web":                 "web\n",
		"rename web --alias a --alias b": "web a b\n",
		"rename web shop --alias a":      "shop a\n",
	} {
		if got := b.must(strings.Fields(line)...); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	for _, line := range []string{"rename", "rename a b c", "rename a/b x", "rename web 12", "rename web x --alias a/b"} {
		if code := b.run(strings.Fields(line)...); code != 2 {
			t.Errorf("%s: exit status %d: %s", line, code, &b.err)
		}
	}
	for _, note := range []string{"rename 815 web []", "rename web  [a b]", "rename web shop [a]"} {
		if !strings.Contains(b.daemon.notes.String(), note) {
			t.Errorf("%q is not among %s", note, b.daemon.notes)
		}
	}
}
