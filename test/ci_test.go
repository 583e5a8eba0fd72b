// Tests of docs/ci.md and of the GitHub action: what stands there is run here as it stands there, on hosts that are runners. The
// runners are this file's: they do with a job's steps what those of GitHub, GitLab and Jenkins do with a shell's part of them.

package test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

// ciFiles are what the tests here read of the repository.
var ciFiles = []string{
	"README.md", "action.yml", "docs/ci.md",
	".ci/action/main.js", ".ci/action/post.js", ".ci/action/script.js", ".ci/action/up.sh", ".ci/action/down.sh",
}

// roleVar has this program be a job's own server or test instead of running tests.
const roleVar = "ROOTLESS_OVL_CI_ROLE"

// jobPort is where a job's server listens.
const jobPort = "8080"

// play is what server.sh and test.sh of a job are: the test asks the server at a URL, or at $API, for as long as it takes to start, prints its
// answer, which is the address that the server saw, and then asks for the server's end.
func play(role string, args []string) int {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	switch role {
	case "server":
		done := make(chan struct{}, 1)
		server := &http.Server{Addr: ":" + jobPort, ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			_, _ = io.WriteString(w, host)
			if r.URL.Path == "/done" {
				select {
				case done <- struct{}{}:
				default:
				}
			}
		})}
		go func() {
			select {
			case <-done:
			case <-ctx.Done():
			}
			_ = server.Shutdown(ctx)
		}()
		if err := server.ListenAndServe(); err != http.ErrServerClosed {
			fmt.Fprintln(os.Stderr, "server:", err)
			return 1
		}
		return 0
	default:
		url := os.Getenv("API")
		if len(args) > 0 {
			url = args[0]
		}
		client := &http.Client{Timeout: 5 * time.Second}
		var err error
		for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
			var resp *http.Response
			if resp, err = client.Get(url); err != nil {
				continue
			}
			_, err = io.Copy(os.Stdout, resp.Body)
			resp.Body.Close()
			if err == nil {
				fmt.Println()
				// Its network may go before its answer has come.
				if resp, err := client.Get(strings.TrimSuffix(url, "/") + "/done"); err == nil {
					resp.Body.Close()
				}
				return 0
			}
		}
		fmt.Fprintln(os.Stderr, "test:", err)
		return 1
	}
}

// document is a file of the repository.
func document(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(lab.Repository(), name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// blocks are the fenced blocks of one language in docs/ci.md.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	var list []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(document(t, "docs/ci.md"), -1) {
		list = append(list, m[1])
	}
	if len(list) == 0 {
		t.Fatalf("docs/ci.md has no block of %s", language)
	}
	return list
}

// job is what a runner gives a job on a host.
type job struct {
	t    *testing.T
	h    *lab.Host
	dir  string            // the checkout
	env  map[string]string // beside the host's
	path []string          // before the host's PATH
}

// newJob makes a host a runner with the program in /usr/local/bin, and a checkout of what a job tests.
func newJob(t *testing.T, h *lab.Host) *job {
	t.Helper()
	j := &job{t: t, h: h, dir: filepath.Join(h.Home(), "checkout"), env: map[string]string{}}
	if err := h.Do(func() error { return unix.Mount("none", "/usr/local/bin", "tmpfs", 0, "mode=0755") }); err != nil {
		t.Fatal(err)
	}
	j.program("rootless-ovl", "#!/bin/sh\nexec '"+h.Binary()+"' \"$@\"\n")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{"server", "test"} {
		j.file(role+".sh", fmt.Sprintf("#!/bin/sh\nexec env %s=%s '%s' \"$@\"\n", roleVar, role, self))
	}
	return j
}

// program puts a program into the runner's /usr/local/bin.
func (j *job) program(name, text string) {
	j.t.Helper()
	if err := j.h.Do(func() error { return os.WriteFile(filepath.Join("/usr/local/bin", name), []byte(text), 0o755) }); err != nil {
		j.t.Fatal(err)
	}
}

func (j *job) file(name, text string) {
	j.t.Helper()
	path := filepath.Join(j.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		j.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		j.t.Fatal(err)
	}
}

// shell runs one with these arguments in the checkout.
func (j *job) shell(env map[string]string, argv ...string) lab.Result {
	j.t.Helper()
	return j.h.RunWith(func(cmd *exec.Cmd) {
		cmd.Dir = j.dir
		all := maps.Clone(j.env)
		maps.Copy(all, env)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			cmd.Env = append(cmd.Env, name+"="+all[name])
		}
		for _, kv := range cmd.Env {
			if path, found := strings.CutPrefix(kv, "PATH="); found && len(j.path) > 0 {
				cmd.Env = append(cmd.Env, "PATH="+strings.Join(j.path, ":")+":"+path)
				break
			}
		}
	}, argv[0], argv[1:]...)
}

// must has a step of the job have succeeded.
func (j *job) must(r lab.Result, what string) lab.Result {
	j.t.Helper()
	if r.Code != 0 {
		logs := ""
		for _, name := range []string{"ovl.log", "server.log"} {
			if b, err := os.ReadFile(filepath.Join(j.dir, name)); err == nil {
				logs += "\n" + name + ":\n" + string(b)
			}
		}
		j.t.Fatalf("%s: exit code %d\n%s%s%s", what, r.Code, r.Stdout, r.Stderr, logs)
	}
	return r
}

// onOverlay fails the test unless the job's test printed, in a line of its own, an address of the overlay.
func onOverlay(t *testing.T, r lab.Result, overlay netip.Prefix) {
	t.Helper()
	for line := range strings.Lines(r.Stdout) {
		if addr, err := netip.ParseAddr(strings.TrimSpace(line)); err == nil {
			if !overlay.Contains(addr) {
				t.Errorf("the server saw %v, want an address of %v", addr, overlay)
			}
			return
		}
	}
	t.Errorf("the server's answer was not printed:\n%s%s", r.Stdout, r.Stderr)
}

// byDefault is the network of a store that nobody configured.
var byDefault = netip.MustParsePrefix("10.213.0.0/16")

// gaveBack fails the test unless the store on a host has no lease but that host's own: a lease ends by itself, too, but later.
func gaveBack(t *testing.T, h *lab.Host) {
	t.Helper()
	client := h.EtcdClient(t, etcdURL(h))
	lab.EventuallyWithin(t, 10*time.Second, "the jobs' nodes have given their subnets back", func() bool {
		r, err := client.Get(t.Context(), "/coreos.com/network/subnets/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		return err == nil && r.Count == 1
	})
}

func TestCI_TheScriptStandsByItself(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	j := newJob(t, l.Host(1))
	onOverlay(t, j.must(j.shell(nil, "/bin/bash", "-ec", blocks(t, "sh")[0]), "the script"), byDefault)
	refused(t, j.h.CLI("status"), "not running")
}

// workflow is as much of a GitHub workflow as docs/ci.md has.
type workflow struct {
	Jobs map[string]struct {
		Steps []step `json:"steps"`
	} `json:"jobs"`
}

type step struct {
	Uses string         `json:"uses"`
	With map[string]any `json:"with"`
	Run  string         `json:"run"`
}

func workflows(t *testing.T) []workflow {
	t.Helper()
	var list []workflow
	for _, text := range blocks(t, "yaml") {
		var w workflow
		if err := yaml.Unmarshal([]byte(text), &w); err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		if len(w.Jobs) > 0 {
			list = append(list, w)
		}
	}
	return list
}

// github is a job on a runner of GitHub's kind.
type github struct {
	*job
	temp    string            // RUNNER_TEMP
	values  map[string]string // of ${{ }}
	sources map[string]string // the action's inputs with their defaults
	node    string            // path of node, empty where the runner has none
	post    bool              // the action's first part has begun
}

func newGitHub(t *testing.T, h *lab.Host) *github {
	t.Helper()
	g := &github{job: newJob(t, h), temp: filepath.Join(h.Home(), "temp"), values: map[string]string{}, sources: map[string]string{}}
	if path, err := exec.LookPath("node"); err == nil && filepath.Dir(path) != "/usr/local/bin" {
		g.node = path
	} else {
		t.Log("node is not installed: the action's scripts are run without main.js and post.js")
	}
	var action struct {
		Inputs map[string]struct {
			Default string `json:"default"`
		} `json:"inputs"`
	}
	if err := yaml.Unmarshal([]byte(document(t, "action.yml")), &action); err != nil {
		t.Fatal(err)
	}
	for name, input := range action.Inputs {
		g.sources[name] = input.Default
	}
	if err := os.MkdirAll(g.temp, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]string{"GITHUB_ENV": "env", "GITHUB_PATH": "path", "GITHUB_OUTPUT": "output"} {
		g.env[name] = filepath.Join(g.temp, file)
	}
	maps.Copy(g.env, map[string]string{"RUNNER_TEMP": g.temp, "GITHUB_RUN_ID": "4711", "GITHUB_SERVER_URL": "https://github.example", "GITHUB_ACTION_REPOSITORY": "rootless-ovl/rootless-ovl"})
	return g
}

// part runs a part of the action.
func (g *github) part(script, js string, with map[string]any) lab.Result {
	g.t.Helper()
	env := map[string]string{}
	set := func(name, value string) {
		name = "INPUT_" + strings.ToUpper(name)
		if g.node == "" {
			name = strings.ReplaceAll(name, "-", "_")
		}
		env[name] = regexp.MustCompile(`\$\{\{ *([a-zA-Z_.]+) *\}\}`).ReplaceAllStringFunc(value, func(e string) string {
			return g.values[strings.Trim(e, "${} ")]
		})
	}
	for name, value := range g.sources {
		set(name, value)
	}
	for name, value := range with {
		if _, known := g.sources[name]; !known {
			g.t.Errorf("the action has no input %s", name)
		}
		set(name, fmt.Sprint(value))
	}
	action := filepath.Join(lab.Repository(), ".ci/action")
	if g.node == "" {
		return g.shell(env, "/bin/bash", filepath.Join(action, script))
	}
	return g.shell(env, g.node, filepath.Join(action, js))
}

// run does the job's steps one after the other, until one fails, and then the action's last part. It returns the last step's result.
func (g *github) run(steps []step) (last, post lab.Result) {
	g.t.Helper()
	for _, s := range steps {
		switch {
		case strings.HasPrefix(s.Uses, "rootless-ovl/rootless-ovl@"):
			g.post = true
			last = g.part("up.sh", "main.js", s.With)
		case s.Uses != "": // checkout and Go are there
			continue
		default:
			last = g.shell(nil, "/bin/bash", "-ec", s.Run)
		}
		g.takeOver()
		if last.Code != 0 {
			break
		}
	}
	if g.post {
		post = g.part("down.sh", "post.js", nil)
	}
	return last, post
}

// takeOver gives later steps what a step has written for them.
func (g *github) takeOver() {
	if b, err := os.ReadFile(g.env["GITHUB_ENV"]); err == nil {
		for line := range strings.Lines(string(b)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			g.env[name] = value
		}
	}
	if b, err := os.ReadFile(g.env["GITHUB_PATH"]); err == nil {
		g.path = strings.Fields(string(b))
	}
}

// restrict has AppArmor keep the host's programs from making user namespaces, as far as a program can see, and sudo note what it is
// asked for, and return the path of the note.
func (g *github) restrict() string {
	g.t.Helper()
	dir := filepath.Join(g.h.Dir, "kernel")
	if err := os.Mkdir(dir, 0o755); err != nil {
		g.t.Fatal(err)
	}
	for _, name := range []string{"cap_last_cap", "overflowuid", "overflowgid", "osrelease", "pid_max"} {
		b, err := os.ReadFile("/proc/sys/kernel/" + name)
		if err != nil {
			g.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			g.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "apparmor_restrict_unprivileged_userns"), []byte("1\n"), 0o644); err != nil {
		g.t.Fatal(err)
	}
	if err := g.h.Do(func() error { return unix.Mount(dir, "/proc/sys/kernel", "", unix.MS_BIND, "") }); err != nil {
		g.t.Fatal(err)
	}
	note := filepath.Join(g.h.Home(), "sudo")
	g.program("sudo", "#!/bin/sh\n{ echo \"$@\"; [ \"$1\" != tee ] || cat; } >> '"+note+"'\n")
	return note
}

// withGo gives the runner a Go that builds in no time.
func (g *github) withGo() {
	g.program("go", `#!/bin/sh
[ "$1" = build ] && [ -e action.yml ] || { echo "go $*: not in the action's source" >&2; exit 1; }
while [ "$1" != -o ]; do shift; done
cp '`+g.h.Binary()+`' '`+g.h.Plugin()+`' "$2"
`)
}

func TestCI_AGitHubJobHasItsOwnOverlay(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	g := newGitHub(t, l.Host(1))
	note := g.restrict()
	g.withGo()
	last, post := g.run(workflows(t)[0].Jobs["test"].Steps)
	g.must(last, "the job")
	onOverlay(t, last, byDefault)
	g.must(post, "the action's last part")
	refused(t, g.h.CLI("--runtime-dir", filepath.Join(g.temp, "rootless-ovl", "run"), "status"), "not running")

	output, err := os.ReadFile(g.env["GITHUB_OUTPUT"])
	if err != nil || !regexp.MustCompile(`^subnet=10\.213\.\d+\.0/24\ngateway=10\.213\.\d+\.1\n$`).Match(output) {
		t.Errorf("outputs %q, %v", output, err)
	}
	asked, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	profile := "/etc/apparmor.d/" + strings.ReplaceAll(strings.TrimPrefix(filepath.Join(g.temp, "rootless-ovl/bin/rootless-ovl"), "/"), "/", ".")
	for _, want := range []string{"tee " + profile + "\n", "\n  userns,\n", "\napparmor_parser -r " + profile + "\n", "\napparmor_parser -R " + profile + "\n", "\nrm -f " + profile + "\n"} {
		if !strings.Contains("\n"+string(asked), want) {
			t.Errorf("sudo was not asked for %q:\n%s", want, asked)
		}
	}
}

func TestCI_JobsOnTwoRunnersShareANetwork(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 3)
	upEmbedded(l.Host(1))
	jobs := workflows(t)[1].Jobs
	type outcome struct{ last, post lab.Result }
	server := make(chan outcome, 1)
	gs, gc := newGitHub(t, l.Host(2)), newGitHub(t, l.Host(3))
	gs.values["vars.OVL_STORE"], gc.values["vars.OVL_STORE"] = etcdURL(l.Host(1)), etcdURL(l.Host(1))
	go func() {
		last, post := gs.run(jobs["server"].Steps)
		server <- outcome{last, post}
	}()
	last, post := gc.run(jobs["client"].Steps)
	s := <-server
	gs.must(s.last, "the server's job")
	gs.must(s.post, "its last part")
	gc.must(last, "the client's job")
	gc.must(post, "its last part")
	onOverlay(t, last, network)
	gaveBack(t, l.Host(1))
}

func TestCI_TheActionSaysWhyThereIsNoNode(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 1)
	g := newGitHub(t, l.Host(1))
	for _, c := range []struct {
		name string
		with map[string]any
		want string
	}{
		{"no store", map[string]any{"etcd-endpoints": "http://" + lab.RouterAddr.String() + ":2379", "wait": "3s"}, "not ready after 3s: the node is waiting-for-store"},
		{"a wrong flag", map[string]any{"args": "--log-level loud"}, "loud"},
		{"a sign that the runner would read", map[string]any{"args": "--log-level 5%"}, "5%25"},
		{"no Go", map[string]any{"program": ""}, "actions/setup-go"},
		{"no such program", map[string]any{"program": "/nowhere/rootless-ovl"}, "/nowhere/rootless-ovl"},
	} {
		if c.with["program"] == nil {
			c.with["program"] = g.h.Binary()
		}
		if c.name == "no Go" && g.h.Run("/bin/sh", "-c", "command -v go").Code == 0 {
			continue
		}
		last, post := g.run([]step{{Uses: "rootless-ovl/rootless-ovl@main", With: c.with}})
		if text := last.Stdout + last.Stderr; last.Code == 0 || !strings.Contains(text, c.want) {
			t.Errorf("%s: exit code %d, want %q in\n%s", c.name, last.Code, c.want, text)
		}
		g.must(post, c.name+": the last part")
		if entries, _ := filepath.Glob(filepath.Join(g.temp, "rootless-ovl")); len(entries) > 0 {
			t.Errorf("%s: left behind: %v", c.name, entries)
		}
	}
}

func TestCI_TheActionTakesOnlyTheReleaseThatItsSumsKnow(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed: the action downloads with it")
	}
	l := lab.New(t, 1)
	g := newGitHub(t, l.Host(1))
	suffix := "-linux-" + map[string]string{"x86_64": "amd64", "aarch64": "arm64"}[strings.TrimSpace(g.h.Run("/bin/uname", "-m").Stdout)]
	name, plugin := "rootless-ovl"+suffix, "rootless-ovl-plugin"+suffix
	release := filepath.Join(g.h.Home(), "rootless-ovl/rootless-ovl/releases/download/v9.9.9")
	g.env["GITHUB_SERVER_URL"] = "file://" + g.h.Home()
	g.must(g.shell(nil, "/bin/bash", "-ec", "mkdir -p "+release+"; cd "+release+"; cp "+g.h.Binary()+" "+name+"; cp "+g.h.Plugin()+" "+plugin+"; sha256sum "+name+" "+plugin+" > SHA256SUMS"), "a release")
	steps := []step{{Uses: "rootless-ovl/rootless-ovl@main", With: map[string]any{"version": "v9.9.9"}}, {Run: "rootless-ovl status; rootless-ovl-plugin --version"}}
	last, post := g.run(steps)
	g.must(last, "the job")
	g.must(post, "the last part")

	for _, other := range []string{plugin, name} {
		g.must(g.shell(nil, "/bin/bash", "-ec", "echo >> "+filepath.Join(release, other)), "another file")
		if last, _ := g.run(steps); last.Code == 0 || !strings.Contains(last.Stdout, other+" that its SHA256SUMS") {
			t.Errorf("%s is not the release's: exit code %d\n%s%s", other, last.Code, last.Stdout, last.Stderr)
		}
	}
}

// joinedStore is a host with a store and a server on its overlay, for the jobs of other hosts.
func joinedStore(t *testing.T, l *lab.Lab) map[string]string {
	t.Helper()
	upEmbedded(l.Host(1))
	api := join(t, l.Host(1), "api")
	api.HTTPServer(t, port(api.addr, 80))
	return map[string]string{"OVL_STORE": etcdURL(l.Host(1)), "API": "http://api.ovl.internal/"}
}

func TestCI_TheReadmesLinesJoinAStore(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	env := joinedStore(t, l)
	_, section, _ := strings.Cut(document(t, "README.md"), "\n**a CI job")
	m := regexp.MustCompile("(?s)```sh\n(.*?)```").FindStringSubmatch(section)
	if m == nil {
		t.Fatal("README.md has no lines for a CI job")
	}
	j := newJob(t, l.Host(2))
	maps.Copy(j.env, env)
	j.env["STORE"] = env["OVL_STORE"]
	onOverlay(t, j.must(j.shell(nil, "/bin/bash", "-ec", m[1]), "the script"), network)
	gaveBack(t, l.Host(1))
}

func TestCI_AGitLabJobJoinsTheStore(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	env := joinedStore(t, l)
	var pipeline map[string]struct {
		Variables    map[string]string `json:"variables"`
		BeforeScript []string          `json:"before_script"`
		Script       []string          `json:"script"`
		AfterScript  []string          `json:"after_script"`
	}
	for _, text := range blocks(t, "yaml") {
		if strings.Contains(text, "before_script:") {
			if err := yaml.Unmarshal([]byte(text), &pipeline); err != nil {
				t.Fatal(err)
			}
		}
	}
	j := newJob(t, l.Host(2))
	maps.Copy(j.env, env)
	j.env["CI_JOB_ID"] = fmt.Sprintf("test-%d", os.Getpid())
	def := pipeline["overlay"]
	for name, value := range def.Variables {
		j.env[name] = os.Expand(value, func(v string) string { return j.env[v] })
	}
	// As the shell executor: both in one shell, the last part in another.
	script := strings.Join(append(slices.Clone(def.BeforeScript), def.Script...), "\n")
	r := j.shell(nil, "/bin/bash", "-c", "set -eo pipefail\n"+script)
	after := j.shell(nil, "/bin/bash", "-c", "set -eo pipefail\n"+strings.Join(def.AfterScript, "\n"))
	onOverlay(t, j.must(r, "the job"), network)
	j.must(after, "after_script")
	gaveBack(t, l.Host(1))
}

func TestCI_AJenkinsStageJoinsTheStore(t *testing.T) {
	t.Parallel()
	l := lab.New(t, 2)
	env := joinedStore(t, l)
	m := regexp.MustCompile(`(?s)sh '''\n(.*?)'''`).FindStringSubmatch(blocks(t, "groovy")[0])
	if m == nil {
		t.Fatal("docs/ci.md has no sh step")
	}
	j := newJob(t, l.Host(2))
	maps.Copy(j.env, env)
	j.env["WORKSPACE_TMP"] = j.dir + "@tmp"
	onOverlay(t, j.must(j.shell(nil, "/bin/sh", "-xec", m[1]), "the step"), network)
	gaveBack(t, l.Host(1))
}
