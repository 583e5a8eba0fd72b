// This file sets up nebula, as root, on both hosts.

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// nebulaMTU is what the wire's 1500 leaves after IPv4 (20), UDP (8), nebula's header (16) and the cipher's tag (16); nebula's
// own default, 1300, would have the 1400-byte datagrams fragmented.
const nebulaMTU = 1500 - 20 - 8 - 16 - 16

const nebulaConfig = `pki: {ca: %[1]s/ca.crt, cert: %[1]s/%[2]s.crt, key: %[1]s/%[2]s.key}
static_host_map: {"10.88.0.1": ["192.0.2.1:4242"], "10.88.0.2": ["192.0.2.2:4242"]}
lighthouse: {am_lighthouse: false}
listen: {host: %[3]s, port: 4242}
punchy: {punch: false}
tun: {dev: nebula1, mtu: %[4]d}
logging: {level: warning, format: text}
firewall:
  outbound: [{port: any, proto: any, host: any}]
  inbound: [{port: any, proto: any, host: any}]
`

func (l *lab) startNebula(ctx context.Context) (network, error) {
	dir := filepath.Join(l.dir, "nebula")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return network{}, err
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	if err := l.h1.run(ctx, "nebula-cert", "ca", "-name", "bench", "-out-crt", file("ca.crt"), "-out-key", file("ca.key")); err != nil {
		return network{}, err
	}
	p := &path{peer: peerNebula}
	for i, h := range []*host{l.h1, l.h2} {
		addr := netip.AddrFrom4([4]byte{10, 88, 0, byte(i + 1)})
		if err := h.run(ctx, "nebula-cert", "sign", "-ca-crt", file("ca.crt"), "-ca-key", file("ca.key"), "-name", h.name,
			"-ip", addr.String()+"/24", "-out-crt", file(h.name+".crt"), "-out-key", file(h.name+".key")); err != nil {
			return network{}, err
		}
		config := file(h.name + ".yml")
		if err := os.WriteFile(config, fmt.Appendf(nil, nebulaConfig, dir, h.name, h.addr, nebulaMTU), 0o600); err != nil {
			return network{}, err
		}
		daemon, err := l.launch(h.space, "nebula-"+h.name, l.command(false, dir, "nebula", "-config", config))
		if err != nil {
			return network{}, err
		}
		p.daemons = append(p.daemons, daemon)
		if e := (end{h.space, addr}); i == 0 {
			p.a = e
		} else {
			p.b = e
		}
	}
	if err := p.daemons[1].waitAnswer(ctx, p.a.space, p.b.addr); err != nil {
		return network{}, err
	}
	return network{overlay: p}, nil
}

// waitAnswer waits until target answers a ping from s; the process is the one that makes it possible.
func (p *process) waitAnswer(ctx context.Context, s *space, target netip.Addr) error {
	return waitFor(ctx, 15*time.Second, p, func() error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := firstAnswer(ctx, s, target)
		return err
	})
}
