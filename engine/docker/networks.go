// This file is docker's networks: what was asked for when one was created, kept on disk, and what cannot be had.

package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const networksFile = "docker-networks.json"

// networks are the networks that docker has made of this driver. It is safe for many goroutines.
type networks struct {
	path   string
	closed error // why nothing is written: the file may have what we could not read; nil: it has not

	mu   sync.Mutex
	byID map[string]options
}

// savedNetworks is the file.
type savedNetworks struct {
	V        int                `json:"v"`
	Networks map[string]options `json:"networks"`
}

// openNetworks reads the file. One that cannot be read is no networks and an error that says so: it is kept aside under another name, for
// the next network that docker creates would take its place.
func openNetworks(dir string) (*networks, error) {
	n := &networks{path: filepath.Join(dir, networksFile), byID: make(map[string]options)}
	b, err := os.ReadFile(n.path)
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil
	}
	if err != nil {
		return n, n.setAside(fmt.Errorf("docker's networks: %w", err))
	}
	var saved savedNetworks
	if err := json.Unmarshal(b, &saved); err != nil {
		return n, n.setAside(fmt.Errorf("%s: %w", n.path, err))
	}
	if saved.V != 1 {
		return n, n.setAside(fmt.Errorf("%s is of version %d, not 1", n.path, saved.V))
	}
	for id, o := range saved.Networks {
		n.byID[id] = o
	}
	return n, nil
}

// setAside keeps a file that why is about, and says where and what to do.
func (n *networks) setAside(why error) error {
	aside := n.path + ".bad-" + time.Now().UTC().Format("20060102T150405.000000000")
	if err := os.Rename(n.path, aside); err != nil {
		n.closed = fmt.Errorf("docker's networks cannot be written: %w; move %s away and start the daemon again", why, n.path)
		return fmt.Errorf("%w, and it cannot be moved aside (%w): no network is created until %s is moved away and the daemon started again", why, err, n.path)
	}
	return fmt.Errorf("%w: it is kept as %s. Put a good one in its place and start the daemon again, or, for each network that "+
		"`docker network ls --filter driver=rootless-ovl` lists, %s", why, aside, howToRemake("", options{}))
}

func (n *networks) get(id string) (options, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	o, ok := n.byID[id]
	return o, ok
}

// put remembers a network; nothing is changed on an error.
func (n *networks) put(id string, o options) error {
	return n.change(func(m map[string]options) { m[id] = o })
}

func (n *networks) remove(id string) error {
	if _, known := n.get(id); !known {
		return nil
	}
	return n.change(func(m map[string]options) { delete(m, id) })
}

func (n *networks) change(do func(map[string]options)) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed != nil {
		return n.closed
	}
	next := make(map[string]options, len(n.byID)+1)
	for id, o := range n.byID {
		next[id] = o
	}
	do(next)
	b, err := json.Marshal(savedNetworks{V: 1, Networks: next})
	if err != nil {
		return fmt.Errorf("docker's networks: %w", err)
	}
	if err := writeFile(n.path, b); err != nil {
		return fmt.Errorf("docker's networks are not saved: %w", err)
	}
	n.byID = next
	return nil
}

// writeFile writes a file whole or not at all.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // does nothing once it is renamed
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// howToCreate is the command that errors point to.
const howToCreate = "`docker network create -d rootless-ovl --ipam-driver rootless-ovl NAME`"

// howToRemake are the commands by which a network gets a subnet or options that are not those it was created with; network is its name or id, "" if
// it is not known. Docker removes none that a container is connected to, and a stopped one that still is could not be started any more.
func howToRemake(network string, o options) string {
	if network == "" {
		network = "NAME"
	}
	flags := ""
	for _, f := range o.flags() {
		flags += " -o " + f
	}
	return fmt.Sprintf("disconnect its containers, stopped ones too (`docker ps -a --filter network=%[1]s` lists them; `docker network disconnect -f %[1]s CONTAINER` each), "+
		"then `docker network rm %[1]s`, `docker network create -d rootless-ovl --ipam-driver rootless-ovl%[2]s NAME`, and `docker network connect NAME CONTAINER` each", network, flags)
}

func (d *Driver) createNetwork(ctx context.Context, r *createNetworkRequest) (any, error) {
	if on, _ := flag(r.Options, labelInternal); on {
		return nil, errors.New("--internal: docker would also keep the container's resolver from the overlay: leave it out, and use -o egress=deny " +
			"for containers that shall not reach the outside")
	}
	if on, _ := flag(r.Options, labelIPv6); on || len(r.IPv6Data) > 0 {
		return nil, errIPv6
	}
	if on, given := flag(r.Options, labelIPv4); given && !on {
		return nil, errors.New("--ipv4=false: every container of the overlay has an IPv4 address: leave it out")
	}
	s, err := d.ready(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkPools(r.IPv4Data, s); err != nil {
		return nil, err
	}
	given, err := userOptions(r.Options)
	if err != nil {
		return nil, err
	}
	o, err := options{}.with(given)
	if err != nil {
		return nil, err
	}
	return nothing{}, d.networks.put(r.NetworkID, o)
}

var errIPv6 = errors.New("--ipv6: leave it out: in a dual-stack overlay containers get an IPv6 address with their IPv4 one")

// checkPools refuses a network whose addresses do not come from this driver.
func checkPools(pools []ipamData, s api.Status) error {
	switch {
	case len(pools) != 1:
		return fmt.Errorf("%d IPv4 pools: the node has one subnet, %s: create the network with %s", len(pools), s.Subnet, howToCreate)
	case pools[0].Pool != s.Subnet:
		return fmt.Errorf("the subnet %s is not this node's, %s, from which peers reach its containers: create the network with %s and without --subnet",
			pools[0].Pool, s.Subnet, howToCreate)
	case len(pools[0].AuxAddresses) > 0:
		return fmt.Errorf("--aux-address: leave it out: no address of the subnet %s is used that the node has not given out", s.Subnet)
	}
	if gateway, err := addrOf(pools[0].Gateway); pools[0].Gateway != "" && (err != nil || gateway.String() != s.Gateway) {
		return fmt.Errorf("--gateway %s: the gateway is the node's, %s: leave it out", pools[0].Gateway, s.Gateway)
	}
	return nil
}

func (d *Driver) deleteNetwork(_ context.Context, r *networkRequest) (any, error) {
	return nothing{}, d.networks.remove(r.NetworkID)
}
