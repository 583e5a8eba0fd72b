// Tests of the stages: what is attached, as what, and what is not.

package ocihook

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestHook_AttachesAndDetachesByOwner(t *testing.T) {
	s := newStage(t)
	if err := s.create(map[string]string{"run.rootless-ovl.attach": "web", "org.example": "x"}); err != nil {
		t.Fatal(err)
	}
	want := []api.AttachRequest{{PID: pidA, Name: "web", Owner: "oci/" + containerA}}
	if !reflect.DeepEqual(s.daemon.attached, want) {
		t.Errorf("attached %+v, want %+v", s.daemon.attached, want)
	}
	if err := s.run("stopped", containerB, 0, nil); err != nil || len(s.daemon.detached) != 0 {
		t.Errorf("another container's end: %v, detached %v", err, s.daemon.detached)
	}
	for range 2 { // a stage may be run twice
		if err := s.run("stopped", containerA, 0, nil); err != nil {
			t.Error(err)
		}
	}
	if len(s.daemon.list) != 0 || !reflect.DeepEqual(s.daemon.detached, []string{"web"}) {
		t.Errorf("left %+v, detached %v", s.daemon.list, s.daemon.detached)
	}
}

func TestHook_AttachesWithAnnotations(t *testing.T) {
	s := newStage(t)
	digits := "123456789012a" + containerA[13:]
	for _, tt := range []struct {
		name        string
		id          string
		annotations map[string]string
		want        api.AttachRequest
	}{
		{"every container", containerA, nil, api.AttachRequest{Name: "3f1c9a0b7d2e"}},
		{"no name", containerA, map[string]string{"run.rootless-ovl.attach": ""}, api.AttachRequest{Name: "3f1c9a0b7d2e"}},
		{"true", containerA, map[string]string{"run.rootless-ovl.attach": "true"}, api.AttachRequest{Name: "3f1c9a0b7d2e"}},
		{"an id of digits", digits, map[string]string{"run.rootless-ovl.attach": "true"}, api.AttachRequest{Name: "123456789012a"}},
		{"an option alone", containerA, map[string]string{"run.rootless-ovl.alias": "w, front"}, api.AttachRequest{Name: "3f1c9a0b7d2e", Aliases: []string{"w", "front"}}},
		{"all", containerA, map[string]string{
			"run.rootless-ovl.attach": "web", "run.rootless-ovl.alias": "w", "run.rootless-ovl.publish": "8080:80,127.0.0.1:53:53/udp",
			"run.rootless-ovl.snat": "true", "run.rootless-ovl.ip": "10.213.7.20", "run.rootless-ovl.mac": "02:00:00:00:00:07",
			"run.rootless-ovl.ifname": "ovl1", "run.rootless-ovl.isolate": "", "run.rootless-ovl.allow-from": "10.213.0.0/16:80/tcp",
			"run.rootless-ovl.allow-to": "10.213.9.0/24,10.213.8.1:53/udp", "run.rootless-ovl.egress": "deny",
			"run.rootless-ovl.host-access": "5432,8080", "run.rootless-ovl.no-default-route": "true", "run.rootless-ovl.dns": "keep",
		}, api.AttachRequest{
			Name: "web", Aliases: []string{"w"}, Publish: []string{"8080:80", "127.0.0.1:53:53/udp"}, SNAT: true, Addr: "10.213.7.20",
			MAC: "02:00:00:00:00:07", IfName: "ovl1", NoDefaultRoute: true, Policy: api.Policy{
				Isolate: true, AllowFrom: []string{"10.213.0.0/16:80/tcp"}, AllowTo: []string{"10.213.9.0/24", "10.213.8.1:53/udp"},
				Egress: []string{"deny"}, HostAccess: []int{5432, 8080},
			},
		}},
		{"false is the default", containerA, map[string]string{"run.rootless-ovl.snat": "false", "run.rootless-ovl.isolate": "false"}, api.AttachRequest{Name: "3f1c9a0b7d2e"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.daemon.attached, s.daemon.list = nil, nil
			if err := s.run("creating", tt.id, pidA, tt.annotations); err != nil {
				t.Fatal(err)
			}
			tt.want.PID, tt.want.Owner = pidA, "oci/"+tt.id
			if len(s.daemon.attached) != 1 || !reflect.DeepEqual(s.daemon.attached[0], tt.want) {
				t.Errorf("attached %+v\nwant %+v", s.daemon.attached, tt.want)
			}
		})
	}
}

func TestHook_RefusesAnnotationsThatCannotBeRight(t *testing.T) {
	for key, tt := range map[string]struct{ value, says string }{
		"atach":            {"web", "host-access"}, // lists what there is
		"attach":           {"my web", "my web"},
		"alias":            {"a,,b", "empty"},
		"publish":          {"http", "http"},
		"snat":             {"yes", "true or false"},
		"ip":               {"10.213.7.20/24", "without a length"},
		"mac":              {"x", "MAC"},
		"ifname":           {"", "empty"},
		"isolate":          {"1", "true or false"},
		"allow-from":       {"all", "CIDR"},
		"allow-to":         {"10.0.0.1/8", "10.0.0.0/8"},
		"egress":           {"none", "allow, deny"},
		"host-access":      {"80-90", "80-90"},
		"dns":              {"10.0.0.1", "use keep"},
		"no-default-route": {"no", "true or false"},
	} {
		t.Run(key, func(t *testing.T) {
			s := newStage(t)
			err := s.create(map[string]string{"run.rootless-ovl." + key: tt.value})
			if err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "annotation") {
				t.Errorf("error %v, want one that says %q of an annotation", err, tt.says)
			}
			if len(s.daemon.attached) != 0 {
				t.Errorf("attached %+v", s.daemon.attached)
			}
		})
	}
}

func TestHook_LeavesOutWhoDoesNotWantIt(t *testing.T) {
	s := newStage(t)
	s.daemon.down = 100
	if err := s.create(map[string]string{"run.rootless-ovl.attach": "false"}); err != nil || len(s.daemon.attached) != 0 {
		t.Errorf("%v, attached %+v", err, s.daemon.attached)
	}
}

func TestHook_RefusesTheHostsNetwork(t *testing.T) {
	s := newStage(t)
	s.netns("5000", hostInode)
	err := s.run("created", containerA, 5000, map[string]string{"run.rootless-ovl.attach": "web"})
	if err == nil || !strings.Contains(err.Error(), "--network none") {
		t.Errorf("error %v, want one that says --network none", err)
	}
	if err := s.run("created", containerA, 5000, nil); err != nil {
		t.Errorf("one of every container: %v", err)
	}
	if len(s.daemon.attached) != 0 {
		t.Errorf("attached %+v", s.daemon.attached)
	}
}

func TestHook_AttachesAPodOnce(t *testing.T) {
	s := newStage(t)
	s.sharesWith(infra)
	annotations := map[string]string{"run.rootless-ovl.attach": "pod", "run.rootless-ovl.publish": "8080:80", "run.rootless-ovl.alias": "p"}

	// The pod's own container has no annotation.
	if err := s.run("created", containerA, pidB, annotations); err != nil {
		t.Fatal(err)
	}
	if len(s.daemon.attached) != 1 || s.daemon.attached[0].PID != infra || s.daemon.attached[0].Owner != "" {
		t.Fatalf("attached %+v, want the process that holds the namespace, which no member owns", s.daemon.attached)
	}
	s.daemon.list[0].Inode, s.daemon.list[0].Addr, s.daemon.list[0].Aliases = podInode, "10.213.7.9/24", []string{"p"}
	s.daemon.list[0].Ports = []api.Port{{HostPort: 8080, Port: 80, Proto: "tcp"}}
	if err := os.Remove(filepath.Join(s.dir, "bundle/rootfs/etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	if err := s.run("created", containerB, pidB, annotations); err != nil {
		t.Fatal(err)
	}
	if len(s.daemon.attached) != 1 {
		t.Errorf("a second member is attached, too: %+v", s.daemon.attached)
	}
	if got := s.read("bundle/rootfs/etc/resolv.conf"); !strings.Contains(got, "10.213.7.1") {
		t.Errorf("a second member's resolv.conf: %q", got)
	}
	for key, value := range map[string]string{"attach": "other", "alias": "q", "ip": "10.213.7.10", "publish": "8081:80"} {
		err := s.run("created", containerB, pidB, map[string]string{"run.rootless-ovl." + key: value})
		if err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(value, ":80")) || !strings.Contains(err.Error(), "pod") {
			t.Errorf("a member with %s=%s: %v", key, value, err)
		}
	}
	if err := s.run("stopped", containerA, 0, annotations); err != nil || len(s.daemon.list) != 1 {
		t.Errorf("a member's end: %v, left %+v", err, s.daemon.list)
	}
}

// Of one that has ended, say, whose number another process has now.
func TestHook_AttachesTheContainerWhereTheHolderIsElsewhere(t *testing.T) {
	for name, change := range map[string]func(s *stage){
		"in another namespace": func(s *stage) { s.netns("4300", newInode) },
		"ended":                func(*stage) {},
	} {
		s := newStage(t)
		s.sharesWith(4300)
		change(s)
		if err := s.run("created", containerA, pidB, map[string]string{"run.rootless-ovl.attach": "web"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		want := []api.AttachRequest{{PID: pidB, Name: "web", Owner: Owner(containerA)}}
		if !reflect.DeepEqual(s.daemon.attached, want) {
			t.Errorf("%s: attached %+v, want %+v", name, s.daemon.attached, want)
		}
	}
}

func TestHook_GivesAPodOfEveryContainerItsName(t *testing.T) {
	const sandbox = "io.kubernetes.cri-o.SandboxID"
	s := newStage(t)
	if err := s.run("created", containerA, pidB, nil); err != nil { // the pod's own
		t.Fatal(err)
	}
	s.daemon.list[0].Inode = podInode
	s.sharesWith(infra)
	if err := s.run("created", containerB, pidB, map[string]string{sandbox: containerA}); err != nil || len(s.daemon.attached) != 1 {
		t.Fatalf("a member that asks for nothing: %v, attached %+v", err, s.daemon.attached)
	}
	for range 2 {
		if err := s.run("created", containerB, pidB, map[string]string{sandbox: containerA, "run.rootless-ovl.attach": "shop"}); err != nil {
			t.Fatal(err)
		}
		s.daemon.list[0].Inode = podInode
	}
	want := api.Attachment{Name: "shop", PID: infra, Owner: Owner(containerA), Inode: podInode, DNS: s.daemon.list[0].DNS}
	if len(s.daemon.attached) != 2 || len(s.daemon.list) != 1 || !reflect.DeepEqual(s.daemon.list[0], want) {
		t.Errorf("attached %+v, now %+v", s.daemon.attached, s.daemon.list)
	}
	if err := s.run("stopped", containerA, 0, nil); err != nil || len(s.daemon.list) != 0 {
		t.Errorf("the pod's end: %v, left %+v", err, s.daemon.list)
	}
}

func TestHook_JoinsWhoWasFasterInThePod(t *testing.T) {
	s := newStage(t)
	s.sharesWith(infra)
	s.daemon.between = func() {
		s.daemon.list = []api.Attachment{{Name: "pod", Inode: podInode}}
		s.daemon.attachErr = api.Errorf(api.CodeInUse, "it is already attached as \"pod\"")
	}
	if err := s.run("created", containerA, pidB, map[string]string{"run.rootless-ovl.attach": "pod"}); err != nil {
		t.Error(err)
	}
}

func TestHook_GoesBesideAnotherNetwork(t *testing.T) {
	const eth0 = loOnly + "  eth0: 1 2\n"
	const route = noRoutes + "tap0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\n"
	const local = noRoutes + "tap0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n"
	engineFile := map[string]string{"/etc/resolv.conf": "/run/containers/overlay-containers/" + containerA + "/userdata/resolv.conf"}
	for name, tt := range map[string]struct {
		dev, route  string
		mounts      map[string]string
		annotations map[string]string
		ifname      string
		noDefault   bool
	}{
		"none":                {loOnly, noRoutes, nil, nil, "", false},
		"an interface":        {eth0, local, nil, nil, "ovl0", true},
		"a default route":     {loOnly, route, nil, nil, "ovl0", true},
		"other routes":        {loOnly, local, nil, nil, "", false},
		"one that comes late": {loOnly, noRoutes, engineFile, nil, "ovl0", true},
		"a name":              {eth0, route, nil, map[string]string{"run.rootless-ovl.ifname": "my0"}, "my0", true},
		"a route":             {eth0, local, nil, map[string]string{"run.rootless-ovl.no-default-route": "false"}, "ovl0", false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			s.network(pidA, tt.dev, tt.route)
			s.mounts(tt.mounts)
			if tt.annotations == nil {
				tt.annotations = map[string]string{}
			}
			tt.annotations["run.rootless-ovl.dns"] = "keep"
			if err := s.create(tt.annotations); err != nil {
				t.Fatal(err)
			}
			if r := s.daemon.attached[0]; r.IfName != tt.ifname || r.NoDefaultRoute != tt.noDefault {
				t.Errorf("interface %q, no default route %v", r.IfName, r.NoDefaultRoute)
			}
		})
	}
}

func TestHook_WaitsForADaemonThatRestarts(t *testing.T) {
	s := newStage(t)
	s.daemon.down = 2
	s.hook.patience = patience
	if err := s.create(nil); err != nil || len(s.daemon.attached) != 1 {
		t.Errorf("%v, attached %+v", err, s.daemon.attached)
	}
}

func TestHook_ReplacesWhatAnEarlierLifeLeft(t *testing.T) {
	s := newStage(t)
	s.daemon.list = []api.Attachment{{Name: "web", Owner: Owner(containerA), Inode: 1}, {Name: "other", Owner: Owner(containerB), Inode: 2}}
	if err := s.create(map[string]string{"run.rootless-ovl.attach": "web"}); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(s.daemon.detached, []string{"web"}) || len(s.daemon.list) != 2 {
		t.Errorf("detached %v, left %+v", s.daemon.detached, s.daemon.list)
	}
}

func TestHook_TellsTheEngine(t *testing.T) {
	const log = "userdata/oci-log"
	for name, tt := range map[string]struct {
		argv []string
		told bool
	}{
		"podman's crun":    {[]string{"/usr/bin/crun", "--log-format=json", "--log=LOG", "create", "--bundle", "x", "id"}, true},
		"two words":        {[]string{"runc", "--log-format", "json", "--log", "LOG", "create", "id"}, true},
		"text":             {[]string{"crun", "--log-format=text", "--log=LOG", "create", "id"}, false},
		"no log":           {[]string{"crun", "create", "id"}, false},
		"not a path":       {[]string{"crun", "--log-format=json", "--log=journald:", "create", "id"}, false},
		"a file elsewhere": {[]string{"crun", "--log-format=json", "--log=LOG.gone", "create", "id"}, false},
		"another command":  {[]string{"crun", "--log-format=json", "--log=LOG", "run", "id"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			path := s.write(log, "theirs\n")
			s.write("proc/4000/cmdline", strings.ReplaceAll(strings.Join(tt.argv, "\x00")+"\x00", "LOG", path))
			s.daemon.down = 100
			err := s.create(nil)
			if err == nil || !strings.Contains(err.Error(), "rootless-ovl up") {
				t.Errorf("error %v, want one that says `rootless-ovl up`", err)
			}
			got := s.read(log)
			if !tt.told {
				if got != "theirs\n" {
					t.Errorf("the log is %q", got)
				}
				return
			}
			var line struct{ Msg, Level string }
			if err := json.Unmarshal([]byte(got), &line); err != nil || !strings.Contains(line.Msg, "rootless-ovl up") || line.Level != "error" {
				t.Errorf("the log is %q: %v", got, err)
			}
			if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
				t.Errorf("beside the log: %v, %v", entries, err)
			}
		})
	}
}

func TestHook_EndsWithoutADaemon(t *testing.T) {
	s := newStage(t)
	s.daemon.down = 100
	if err := s.run("stopped", containerA, 0, nil); err != nil {
		t.Errorf("the engine could not remove the container: %v", err)
	}
	if got := s.stderr.String(); !strings.Contains(got, "not running") || !strings.Contains(got, containerA[:12]) {
		t.Errorf("it says %q", got)
	}
}

func TestHook_NamesTheAnnotationForAFlag(t *testing.T) {
	s := newStage(t)
	s.daemon.attachErr = api.Errorf(api.CodeInUse, "name \"web\" is taken: choose another with --name")
	err := s.create(map[string]string{"run.rootless-ovl.attach": "web"})
	if err == nil || !strings.Contains(err.Error(), "run.rootless-ovl.attach") {
		t.Errorf("error %v", err)
	}
}

func TestHook_RefusesOtherStages(t *testing.T) {
	for _, status := range []string{"paused", ""} {
		s := newStage(t)
		err := s.run(status, containerA, pidA, nil)
		if err == nil || !strings.Contains(err.Error(), "createRuntime") {
			t.Errorf("%q: %v", status, err)
		}
	}
	s := newStage(t)
	if err := s.run("creating", containerA, 0, nil); err == nil || !strings.Contains(err.Error(), "createRuntime") {
		t.Errorf("no pid: %v", err)
	}
}
