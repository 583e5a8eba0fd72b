// This file is a run: the site, its rounds, and what is told of them.

package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

const (
	hosts  = 3
	prefix = "/coreos.com/network"
	// remembered is how many of the last events a violation prints.
	remembered = 60
	// settling bounds how long nodes may take to agree after the faults have ended: a client of etcd waits up to some 20 s between two tries,
	// names outlive their node by 20 s.
	settling = 90 * time.Second
)

// The containers all go after the first few rounds, when everything has been used once, and then now and again.
const (
	quietFirst = 4
	quietEach  = 25
)

var network = netip.MustParsePrefix("10.66.0.0/16")

// node is a host with its daemon.
type node struct {
	*lab.Host
	engine *lab.Container // where loose interfaces are made
	subnet netip.Prefix   // for the whole run
	id     string
	mute   bool // its daemon does not answer now
	logs   *logReader
	leaks  *samples

	mu sync.Mutex
	d  *lab.Daemon
}

// daemon is the one that runs now, or ran last.
func (n *node) daemon() *lab.Daemon {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.d
}

func (n *node) set(d *lab.Daemon) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.d = d
}

// run is the state of a soak.
type run struct {
	t       *trial
	seed    uint64
	rng     *rand.Rand
	lab     *lab.Lab
	outside *server
	etcd    *lab.Etcd
	client  *clientv3.Client
	backend string
	nodes   []*node // the first one's daemon lives as long as the run
	// Whose daemon is killed and restarted, and whose is replaced; what is handed over from one to the next must not grow.
	mortal, replaced *node
	begin            time.Time

	members  []*member       // whose container lives
	hurts    []*fault        // of this day
	talks    []*conversation // that must go on
	dying    []dying         // whose end the nodes may not have noticed yet
	freed    []netip.Addr    // nobody's, unless given out again
	closed   []netip.AddrPort
	made     int // members so far, for their identities
	address  int // the last byte of the LAN address that was given out last
	round    int
	settled  time.Duration // the longest time that settling took
	complete map[string]int

	mu     sync.Mutex
	events []string
}

// dying is an attachment whose container has ended.
type dying struct {
	node  *node
	name  string
	ports []uint16
	until time.Time
}

func newRun(t *trial, seed uint64) *run {
	r := &run{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), begin: time.Now(), address: 100, complete: map[string]int{}}
	r.backend = []string{"udp", "vxlan"}[seed%2]
	r.lab = lab.New(t, hosts)
	r.etcd = r.lab.Outside.Etcd(nil, false)
	r.client = r.lab.Outside.EtcdClient(t, r.etcd.Endpoint)
	config := fmt.Sprintf(`{"Network":%q,"Backend":{"Type":%q}}`, network, r.backend)
	if _, err := r.client.Put(t.Context(), prefix+"/config", config); err != nil {
		t.Fatalf("config: %v", err)
	}
	r.outside = serve(t, r, r.lab.Outside.Space, "outside")
	for i := 1; i <= hosts; i++ {
		n := &node{Host: r.lab.Host(i), leaks: &samples{}, logs: &logReader{}}
		r.nodes = append(r.nodes, n)
		n.engine = n.Container("engine")
		n.set(n.Up("--etcd-endpoints", r.etcd.Endpoint))
		st := n.daemon().Status()
		n.id = st.NodeID
		var err error
		if n.subnet, err = netip.ParsePrefix(st.Subnet); err != nil {
			t.Fatalf("%s: subnet %q: %v", n.Name, st.Subnet, err)
		}
	}
	r.mortal, r.replaced = r.nodes[1], r.nodes[2]
	r.say("%s: %s", r.backend, strings.Join(r.eachNode(func(n *node) string { return n.Name + " " + n.subnet.String() }), ", "))
	return r
}

func (r *run) eachNode(f func(*node) string) (texts []string) {
	for _, n := range r.nodes {
		texts = append(texts, f(n))
	}
	return texts
}

// say remembers an event; any goroutine may.
func (r *run) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, fmt.Sprintf("%8.2fs  ", time.Since(r.begin).Seconds())+fmt.Sprintf(format, args...))
	if n := len(r.events) - remembered; n > 0 {
		r.events = slices.Delete(r.events, 0, n)
	}
}

// count counts what came about, for the figures at the end; any goroutine may.
func (r *run) count(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.complete[what]++
}

// rounds is the whole run.
func (r *run) rounds(length time.Duration) {
	end := r.begin.Add(length)
	r.settle()
	for time.Now().Before(end) {
		r.round++
		// Each round has a generator of its own, so that it is the same however often the ones before had to look.
		r.rng = rand.New(rand.NewPCG(r.seed, uint64(r.round)))
		r.day()
		r.settle()
		r.checkReach()
		if r.round%quietEach == quietFirst {
			r.quiet()
		}
		if r.round%20 == 0 {
			fmt.Printf("soak: %v, round %d, %d containers, settled within %v\n", time.Since(r.begin).Round(time.Second), r.round, len(r.members), r.settled.Round(time.Millisecond))
		}
	}
	r.quiet()
	r.judgeLeaks()
	r.figures()
	r.countGoroutines()
}

// violation prints what there is to know and ends the run.
func (r *run) violation(format string, args ...any) {
	r.t.Errorf(format, args...)
	r.dump()
	r.t.Fatalf("round %d", r.round)
}

// dump prints the last events and the states of all nodes.
func (r *run) dump() {
	r.mu.Lock()
	events := slices.Clone(r.events)
	r.mu.Unlock()
	fmt.Printf("\nthe last events:\n%s\n\n", strings.Join(events, "\n"))
	for _, m := range r.members {
		interfaces, _ := m.c.Interfaces()
		routes, _ := m.c.Routes()
		fmt.Printf("member %s: %s; has %v, %v\n", m.id, m, interfaces, routes)
	}
	for _, n := range r.nodes {
		for _, path := range []string{"/v1/status", "/v1/attachments", "/v1/peers"} {
			var body json.RawMessage
			err := n.daemon().Get(path, &body)
			fmt.Printf("%s GET %s: %s %v\n", n.Name, path, body, err)
			if err != nil && n.daemon().Running() {
				n.daemon().Signal(unix.SIGQUIT) // its goroutines go into its log
				break
			}
		}
		env, err := os.ReadFile(filepath.Join(n.daemon().RuntimeDir, "subnet.env"))
		fmt.Printf("%s subnet.env: %q %v\n", n.Name, env, err)
	}
	stored, err := r.stored()
	fmt.Printf("the store: %v\n", err)
	for _, key := range sortedKeys(stored) {
		fmt.Printf("  %s = %s\n", key, stored[key])
	}
	fmt.Println()
}

// figures are printed at the end.
func (r *run) figures() {
	fmt.Printf("\nsoak: %v, %d rounds, %s; settled within %v after a day at the latest\n",
		time.Since(r.begin).Round(time.Second), r.round, r.backend, r.settled.Round(time.Millisecond))
	var counts []string
	for _, what := range sortedKeys(r.complete) {
		counts = append(counts, fmt.Sprintf("%s %d", what, r.complete[what]))
	}
	fmt.Printf("  %s\n", strings.Join(counts, ", "))
	for _, n := range r.nodes {
		n.leaks.print(n.Name)
	}
	for _, n := range r.nodes {
		n.logs.print(n.Name)
	}
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
