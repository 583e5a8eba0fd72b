// Tests of the lab itself: what the other tests take for granted.

package lab_test

import (
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m.Run)) }

func TestLab_IsNotRoot(t *testing.T) {
	if uid := os.Getuid(); uid == 0 {
		t.Errorf("the lab runs as uid 0")
	}
}

func TestLab_HostsReachEachOtherAndTheOutside(t *testing.T) {
	l := lab.New(t, 2)
	for _, dst := range []*lab.Host{l.Host(2), l.Outside} {
		r, err := l.Host(1).Ping(dst.Addr, 3)
		if err != nil || r.Lost() != 0 {
			t.Errorf("h1 to %s: %v, %v", dst.Name, r, err)
		}
	}
	listener, err := l.Outside.Listen("tcp", lab.OutsideAddr.String()+":80")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = io.WriteString(w, host)
	})}
	go func() { _ = server.Serve(listener) }()
	defer server.Close()
	client := &http.Client{Transport: &http.Transport{DialContext: l.Host(1).DialContext, DisableKeepAlives: true}}
	resp, err := client.Get("http://" + lab.OutsideAddr.String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); string(body) != l.Host(1).Addr.String() {
		t.Errorf("the outside saw %q, want the host's own address %s", body, l.Host(1).Addr)
	}
}

func TestLab_ProgramsHaveNoCapability(t *testing.T) {
	l := lab.New(t, 1)
	r := l.Host(1).Run("sh", "-c", "id -u; grep Cap /proc/self/status; cat /etc/resolv.conf; echo $HOME")
	if r.Code != 0 {
		t.Fatalf("exit code %d: %s", r.Code, r.Stderr)
	}
	lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
	if lines[0] == "0" {
		t.Errorf("programs run as uid 0")
	}
	for _, line := range lines {
		if name, value, ok := strings.Cut(line, ":\t"); ok && strings.HasPrefix(name, "Cap") && strings.Trim(value, "0") != "" {
			t.Errorf("%s is %s, want none", name, value)
		}
	}
	if !strings.Contains(r.Stdout, "nameserver "+lab.RouterAddr.String()) || !strings.Contains(r.Stdout, l.Host(1).Home()) {
		t.Errorf("no resolv.conf or HOME of its own:\n%s", r.Stdout)
	}
}

func TestLab_ContainersBelongToTheUser(t *testing.T) {
	l := lab.New(t, 1)
	c := l.Host(1).Container("c1")
	sets, err := lab.Capabilities(c.PID)
	if err != nil || sets["CapEff"] == 0 {
		t.Errorf("capabilities over its own namespace: %v, %v", sets, err)
	}
	if interfaces, err := c.Interfaces(); err != nil || len(interfaces) != 0 {
		t.Errorf("a new container has interfaces %v, %v", interfaces, err)
	}
}
