// This file is a crowd: many of our nodes and flannel's own subnet managers, all at once at one etcd.

package leases

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	stock "github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
	"github.com/flannel-io/flannel/pkg/subnet/etcd"
	"k8s.io/klog/v2"

	"github.com/flannel-io/flannel/pkg/ip"

	"github.com/rootless-ovl/rootless-ovl/lease"
)

const (
	oursInCrowd    = 200
	flannelsCrowd  = 20
	crowdPrefix    = "/coreos.com/network"
	crowdPatience  = 2 * time.Minute
	flannelRetries = 100
)

// one of the crowd.
type one struct {
	name   string
	subnet netip.Prefix
	sees   chan []netip.Prefix // every view of the network, this node's own subnet with it
}

func TestCrowd_EverybodyGetsASubnetOfItsOwnAndSeesAll(t *testing.T) {
	klog.LogToStderr(false) // flannel tells each event of each of its managers
	klog.SetOutput(io.Discard)
	endpoint := startEtcd(t)
	ctx, cancel := context.WithTimeout(t.Context(), crowdPatience)
	t.Cleanup(cancel)

	// 255 subnets for 220 nodes: the last ones have to fight.
	network := netip.MustParsePrefix("10.66.0.0/16")
	if err := registry(ctx, t, endpoint).PutConfig(ctx, lease.DefaultConfig(network)); err != nil {
		t.Fatal(err)
	}

	start := make(chan struct{})
	crowd := make([]*one, 0, oursInCrowd+flannelsCrowd)
	var acquiring sync.WaitGroup
	add := func(name string, acquire func(*one) error) {
		o := &one{name: name, sees: make(chan []netip.Prefix)}
		crowd = append(crowd, o)
		acquiring.Go(func() {
			<-start
			if err := acquire(o); err != nil {
				t.Errorf("%s: %v", o.name, err)
			}
		})
	}
	for i := range oursInCrowd {
		r := registry(ctx, t, endpoint)
		add(fmt.Sprintf("ours %d", i), func(o *one) error { return acquireOurs(ctx, r, o, i) })
	}
	for i := range flannelsCrowd {
		m, err := etcd.NewLocalManager(ctx, &etcd.EtcdConfig{Endpoints: []string{endpoint}, Prefix: crowdPrefix}, ip.IP4Net{}, ip.IP6Net{}, 60)
		if err != nil {
			t.Fatal(err)
		}
		add(fmt.Sprintf("flannel %d", i), func(o *one) error { return acquireFlannels(ctx, t, m, o, i) })
	}
	close(start)
	acquiring.Wait()
	if t.Failed() {
		return
	}

	all := make([]netip.Prefix, 0, len(crowd))
	for _, o := range crowd {
		all = append(all, o.subnet)
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	for i, p := range all {
		if p.Bits() != 24 || !network.Contains(p.Addr()) || i > 0 && all[i-1].Overlaps(p) {
			t.Errorf("subnet %v, after %v", p, all[max(0, i-1)])
		}
	}
	var looking sync.WaitGroup
	for _, o := range crowd {
		looking.Go(func() {
			var last []netip.Prefix
			for !slices.Equal(last, all) {
				select {
				case last = <-o.sees:
				case <-ctx.Done():
					t.Errorf("%s sees %d leases of %d", o.name, len(last), len(all))
					return
				}
			}
		})
	}
	looking.Wait()
	cancel() // ends everybody's watch
}

// registry is the network as one node sees it, over a connection of its own.
func registry(ctx context.Context, t *testing.T, endpoint string) *lease.Registry {
	t.Helper()
	client, err := lease.Dial(ctx, lease.ClientConfig{Endpoints: []string{endpoint}, Timeout: crowdPatience})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return lease.NewRegistry(client, crowdPrefix, nil)
}

// acquireOurs leases a subnet for one of our nodes and begins to watch.
func acquireOurs(ctx context.Context, r *lease.Registry, o *one, i int) error {
	config, err := r.Config(ctx)
	if err != nil {
		return err
	}
	held, err := r.Acquire(ctx, config, lease.Request{
		NodeID: fmt.Sprintf("%032x", i+1),
		Attrs:  lease.Attrs{PublicIP: netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), RootlessOvl: &lease.Extension{Port: 8285, MTU: 1472}},
	})
	if err != nil {
		return err
	}
	o.subnet = held.Lease().Subnet
	go func() {
		_ = r.Watch(ctx, func(s lease.Snapshot) {
			view := make([]netip.Prefix, len(s.Leases))
			for i, l := range s.Leases {
				view[i] = l.Subnet
			}
			show(ctx, o, view)
		})
	}()
	return nil
}

// acquireFlannels leases a subnet for a flannel node and begins to watch, as flannel's backends do.
func acquireFlannels(ctx context.Context, t *testing.T, m subnet.Manager, o *one, i int) error {
	attrs := &stock.LeaseAttrs{PublicIP: ip.FromBytes([]byte{198, 51, 100, byte(i + 1)})}
	l, err := m.AcquireLease(ctx, attrs)
	// flanneld ends where it loses a race (it looks for another error than it gets), and its supervisor starts it again.
	for try := 0; err != nil && err.Error() == "subnet already exists" && try < flannelRetries; try++ {
		t.Logf("%s lost a race", o.name)
		l, err = m.AcquireLease(ctx, attrs)
	}
	if err != nil {
		return err
	}
	o.subnet = prefix4(l.Subnet)
	events := make(chan []stock.Event)
	go subnet.WatchLeases(ctx, m, l, events)
	go func() {
		view := map[netip.Prefix]bool{o.subnet: true}
		for batch := range events {
			for _, e := range batch {
				if e.Type == stock.EventAdded {
					view[prefix4(e.Lease.Subnet)] = true
				} else {
					delete(view, prefix4(e.Lease.Subnet))
				}
			}
			sorted := make([]netip.Prefix, 0, len(view))
			for p := range view {
				sorted = append(sorted, p)
			}
			slices.SortFunc(sorted, netip.Prefix.Compare)
			show(ctx, o, sorted)
		}
	}()
	return nil
}

// show hands a view to whoever looks, at the end of the crowd's race.
func show(ctx context.Context, o *one, view []netip.Prefix) {
	select {
	case o.sees <- view:
	case <-ctx.Done():
	}
}

// startEtcd runs Debian's etcd on loopback until the test ends and returns its URL.
func startEtcd(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("etcd")
	if err != nil {
		t.Fatal("etcd is not installed: apt-get install etcd-server")
	}
	client, peer := freeURL(t), freeURL(t)
	var out bytes.Buffer
	cmd := exec.Command(path, "--data-dir", t.TempDir(), "--name", "crowd", "--logger", "zap", "--log-level", "error",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "crowd="+peer)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // killed below
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Kill)
		<-ended
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		_, err := registry(ctx, t, client).Leases(ctx)
		if err == nil {
			return client
		}
		select {
		case <-ended:
			t.Fatalf("etcd ended: %s", out.String())
		case <-ctx.Done():
			t.Fatalf("etcd does not answer: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// freeURL is a URL on loopback where nothing listens now.
func freeURL(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}
