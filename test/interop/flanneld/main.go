//go:build cgo

// Command flanneld is flannel's daemon for the tests: flannel's packages, put together as its main.go does in etcd mode. The main
// itself cannot be built here, since it imports a cloud vendor's module that cannot be had.
//
// What main.go does besides is left out, because it says nothing on the wire or in the store: rules of iptables or nftables, the
// look for br_netfilter that they need, the health server, Kubernetes.
package main

import (
	"context"
	"flag"
	"fmt"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/udp"   // registers itself
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan" // registers itself
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/ipmatch"
	"github.com/flannel-io/flannel/pkg/subnet"
	"github.com/flannel-io/flannel/pkg/subnet/etcd"
	log "k8s.io/klog/v2"
)

// options are the flags of flanneld that the tests set, with its names and defaults.
type options struct {
	endpoints, prefix, subnetFile string
	renewMargin                   int // minutes
}

func main() {
	var o options
	flag.StringVar(&o.endpoints, "etcd-endpoints", "http://127.0.0.1:2379", "etcd endpoints, separated by commas")
	flag.StringVar(&o.prefix, "etcd-prefix", "/coreos.com/network", "etcd prefix")
	flag.StringVar(&o.subnetFile, "subnet-file", "/run/flannel/subnet.env", "where to write subnet.env")
	flag.IntVar(&o.renewMargin, "subnet-lease-renew-margin", 60, "minutes before a lease ends that it is renewed")
	log.InitFlags(nil)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		log.Exit(err)
	}
	log.Info("Exiting cleanly...")
}

func run(ctx context.Context, o options) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// No previous subnet: flannel finds its lease by the public IP.
	manager, err := etcd.NewLocalManager(ctx, &etcd.EtcdConfig{Endpoints: strings.Split(o.endpoints, ","), Prefix: o.prefix},
		ip.IP4Net{}, ip.IP6Net{}, o.renewMargin)
	if err != nil {
		return fmt.Errorf("subnet manager: %w", err)
	}
	config, err := networkConfig(ctx, manager)
	if err != nil {
		return err
	}
	family, err := ipmatch.GetIPFamily(config.EnableIPv4, config.EnableIPv6)
	if err != nil {
		return err
	}
	iface, err := ipmatch.LookupExtIface("", "", "", family, ipmatch.PublicIPOpts{})
	if err != nil {
		return fmt.Errorf("external interface: %w", err)
	}
	be, err := backend.NewManager(ctx, manager, iface).GetBackend(config.BackendType)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	network, err := be.RegisterNetwork(ctx, &wg, config)
	if err != nil {
		return fmt.Errorf("registering the network: %w", err)
	}
	lease := network.Lease()
	if err := manager.HandleSubnetFile(o.subnetFile, config, false, lease.Subnet, lease.IPv6Subnet, network.MTU()); err != nil {
		return fmt.Errorf("subnet file: %w", err)
	}
	log.Info("Running backend.")
	wg.Go(func() { network.Run(ctx) })
	if err := manager.CompleteLease(ctx, lease, &wg); err != nil {
		log.Errorf("CompleteLease: %v", err)
		if strings.EqualFold(err.Error(), "interrupted") { // somebody deleted the lease
			cancel()
		}
	}
	wg.Wait()
	return nil
}

// networkConfig tries every second until the store has a network configuration.
func networkConfig(ctx context.Context, manager subnet.Manager) (*subnet.Config, error) {
	for {
		config, err := manager.GetNetworkConfig(ctx)
		if err == nil {
			return config, nil
		}
		log.Errorf("Couldn't fetch network config: %v", err)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}
