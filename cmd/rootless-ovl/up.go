// rootless-ovl up: the daemon.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/internal/cage"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/node"
)

const (
	logText = "text"
	logJSON = "json"
)

// upName is the command that takes flanneld's command line.
const upName = "up"

// minLeaseTTL is the shortest --lease-ttl: below it a slow store would cost the lease.
const minLeaseTTL = 5 * time.Second

// flanneld's default and longest --subnet-lease-renew-margin, in minutes.
const (
	defaultRenewMargin = 60
	maxRenewMargin     = 24*60 - 1
)

type upFlags struct {
	etcd       etcdFlags
	listenEtcd string

	network      netip.Prefix
	allowOverlap bool

	iface         []string
	ifaceRegex    []string
	ifaceCanReach string
	publicIP      netip.Addr
	publicIPv6    netip.Addr
	port          int

	ephemeral  bool
	leaseTTL   time.Duration
	subnetFile string

	netConfigPath string
	renewMargin   int // minutes
	ipMasq        bool
	healthzIP     string
	healthzPort   int
	verbosity     int

	proxy string

	hostLoopback   bool
	allowLinkLocal bool

	outboundAddr []string
	outboundIf   string

	replace    bool
	background bool

	sandbox   choice
	logLevel  choice
	logFormat choice
}

func (a *app) upCommand() *cobra.Command {
	f := upFlags{
		sandbox:   choice{value: string(cage.Auto), of: []string{string(cage.Auto), string(cage.On), string(cage.Off)}},
		logLevel:  choice{value: "info", of: []string{"debug", "info", "warn", "error"}},
		logFormat: choice{value: logText, of: []string{logText, logJSON}},
	}
	cmd := &cobra.Command{
		Use:   upName,
		Short: "Run this host's node, in the foreground",
		Long: `Run this host's node: lease a subnet, open the underlay and serve the other commands, until SIGINT or SIGTERM.

Without --etcd-endpoints the node runs an embedded etcd that other nodes can join (see --listen-etcd).
With --output json the log is JSON.

It takes flanneld's command line and environment (FLANNELD_ETCD_ENDPOINTS and so on; a flag goes before the environment). A flag
of flanneld that cannot mean anything here is named in a warning.`,
		Example: `  rootless-ovl up
  rootless-ovl up --listen-etcd 192.0.2.1:2379
  rootless-ovl up --etcd-endpoints http://192.0.2.1:2379
  rootless-ovl up --etcd-endpoints https://etcd:2379 --etcd-cafile ca.pem --ephemeral --port 0`,
		Args:    cobra.NoArgs,
		Version: thisBuild().Version, // has cobra look for --version
		RunE: func(cmd *cobra.Command, _ []string) error {
			a.ownStdout = true // a daemon's output is its log
			c, err := a.upConfig(cmd, &f)
			if err != nil {
				return err
			}
			var eyes sight
			c.Sandbox = &eyes.report
			c.Beside = func(ctx context.Context, listen func(string) (net.Listener, error)) error {
				eyes.tell(c.Log)
				return a.serveDocker(ctx, c, eyes, listen)
			}
			ctx, stop := untilSignal(cmd.Context())
			defer stop()
			if f.background {
				return a.inBackground(ctx)
			}
			if f.replace {
				by := startedBy()
				var release context.CancelFunc
				ctx, release = by.heed(ctx)
				defer release()
				c.Replace, c.Replacing, c.Replaced = true, by.begin, by.done
			}
			for first := true; ; first = false {
				n, err := a.newNode(c)
				if err != nil {
					return usageError{err} // a node is made from flags alone
				}
				if first {
					if eyes, err = a.shutIn(shutInOrder{mode: cage.Mode(f.sandbox.value), config: c, reads: f.etcd.files()}); err != nil {
						return err
					}
				}
				if err := n.Run(ctx); !errors.Is(err, node.ErrConfigChanged) {
					return err
				}
				c.Replace = false
				c.Log.Warn("the network config has changed since the last run: beginning again with that of the store")
			}
		},
	}
	f.etcd.register(cmd, "`URL`s of the etcd cluster to join, repeated or separated by commas (default: run an embedded etcd)")
	fs := cmd.Flags()
	fs.StringVar(&f.listenEtcd, "listen-etcd", node.DefaultListenEtcd, "`host:port` on which the embedded etcd serves this and other nodes")
	fs.TextVar(&f.network, "network", netip.Prefix{}, fmt.Sprintf("network as `CIDR` to create when the store has no config, refused when it has another (default %v)", node.DefaultNetwork))
	fs.BoolVar(&f.allowOverlap, "allow-overlap", false, "start even though the network overlaps a route or a resolver of this host")
	fs.StringArrayVar(&f.iface, "iface", nil, "external interface as `name` or address, may be repeated (default: that of the default route)")
	fs.StringArrayVar(&f.ifaceRegex, "iface-regex", nil, "`pattern` of the external interface's address or name, tried after --iface, may be repeated")
	fs.StringVar(&f.ifaceCanReach, "iface-can-reach", "", "take the interface of the route to this `address`")
	fs.TextVar(&f.publicIP, "public-ip", netip.Addr{}, "IPv4 `address` that peers send to (default: the external interface's)")
	fs.TextVar(&f.publicIPv6, "public-ipv6", netip.Addr{}, "IPv6 `address` that peers send to (default: the external interface's)")
	fs.IntVar(&f.port, "port", node.PortFromConfig, "UDP `port` of this node, 0 for any free one, told to peers in the lease (default: that of the network config)")
	fs.Lookup("port").DefValue = "0" // hides it: the usage text says it better than "-1"
	fs.BoolVar(&f.ephemeral, "ephemeral", false, "lease for a short time and give the subnet back on stop: for CI jobs")
	fs.DurationVar(&f.leaseTTL, "lease-ttl", 0, fmt.Sprintf("`time` the lease lives when this node is gone (default %gh, with --ephemeral %v)", node.DefaultLeaseTTL.Hours(), node.DefaultEphemeralTTL))
	fs.StringVar(&f.subnetFile, "subnet-file", "", "`file` to write flannel's subnet.env to (default: in the runtime directory)")
	fs.StringVar(&f.netConfigPath, "net-config-path", "", "`file` with the network config (JSON) to create when the store has none, instead of --network")
	fs.IntVar(&f.renewMargin, "subnet-lease-renew-margin", defaultRenewMargin, "renew the lease at least this many `minutes` before it ends, 1 to 1439")
	fs.BoolVar(&f.ipMasq, "ip-masq", true, "tell docker in subnet.env that the node translates what leaves the overlay; =false has docker do it too")
	fs.StringVar(&f.healthzIP, "healthz-ip", "0.0.0.0", "`address` of the health checks")
	fs.IntVar(&f.healthzPort, "healthz-port", 0, "TCP `port` that answers GET /healthz and /readyz (default: none)")
	fs.StringVar(&f.proxy, "proxy", "", "`[ADDR:]PORT` of a SOCKS5 and HTTP proxy to the overlay for processes of this host, on 127.0.0.1 unless an address is given (default: none)")
	fs.BoolVar(&f.hostLoopback, "host-loopback", false, "let containers reach this host's loopback through the gateway")
	fs.BoolVar(&f.allowLinkLocal, "allow-link-local", false, "let containers reach 169.254.0.0/16, cloud metadata for one, through the gateway")
	fs.StringSliceVar(&f.outboundAddr, "outbound-addr", nil, "`address` of this host that what containers send outside comes from, one a family, repeated or separated by commas (default: the host's routes say)")
	fs.StringVar(&f.outboundIf, "outbound-if", "", "`name` of the only interface by which what containers send leaves this host (default: the host's routes say)")
	fs.BoolVar(&f.replace, "replace", false, "take the place of the daemon that runs, with its interfaces and sockets: for an upgrade, with the same flags")
	fs.BoolVar(&f.background, "background", false, "with --replace: go on in the background, and return when the place is taken")
	fs.Var(&f.sandbox, "sandbox", "shut the daemon in with seccomp, landlock and no_new_privs: what the kernel has, all or an error, or nothing")
	fs.Var(&f.logLevel, "log-level", "least level to log")
	fs.Var(&f.logFormat, "log-format", "format of the log")
	fs.IntVarP(&f.verbosity, "v", "v", 0, "flanneld's `level` of the log: 1 and above is --log-level debug")
	fs.Bool("version", false, "show what this program was built from")
	registerIdle(fs)
	mustComplete(cmd, "sandbox", f.sandbox.of...)
	mustComplete(cmd, "log-level", f.logLevel.of...)
	mustComplete(cmd, "log-format", f.logFormat.of...)
	return cmd
}

// upConfig is what the environment and the flags say. It tells of what was taken from where and what has no effect.
func (a *app) upConfig(cmd *cobra.Command, f *upFlags) (node.Config, error) {
	taken, err := fromEnvironment(cmd.Flags())
	if err != nil {
		return node.Config{}, err
	}
	c, err := a.nodeConfig(cmd, f)
	if err != nil {
		if len(taken) > 0 && errors.As(err, new(usageError)) {
			err = usagef("%w (the environment has %s)", err, strings.Join(taken, ", "))
		}
		return c, err
	}
	if len(taken) > 0 {
		c.Log.Info("flags from the environment", "variables", strings.Join(taken, ","))
	}
	if stray := strayVariables(); len(stray) > 0 {
		c.Log.Warn("variables of the environment that stand for no flag of flanneld: is a name misspelt?", "variables", strings.Join(stray, ","))
	}
	if flags := idle(cmd.Flags()); flags != "" {
		c.Log.Warn("flags of flanneld that have no effect here", "flags", flags)
	}
	return c, nil
}

// nodeConfig checks the flags and turns them into a Config.
func (a *app) nodeConfig(cmd *cobra.Command, f *upFlags) (node.Config, error) {
	fs := cmd.Flags()
	c := node.Config{
		EtcdPrefix:    f.etcd.prefix,
		Network:       f.network,
		NetworkSet:    fs.Changed("network"),
		AllowOverlap:  f.allowOverlap,
		Iface:         f.iface,
		IfaceRegex:    f.ifaceRegex,
		IfaceCanReach: f.ifaceCanReach,
		PublicIP:      f.publicIP,
		PublicIPv6:    f.publicIPv6,
		Port:          f.port,
		Ephemeral:     f.ephemeral,
		LeaseTTL:      f.leaseTTL,
		SubnetFile:    f.subnetFile,
		NoIPMasq:      !f.ipMasq,
		HostLoopback:  f.hostLoopback,
		LinkLocal:     f.allowLinkLocal,
		OutboundIf:    f.outboundIf,
		Version:       thisBuild().Version,
	}
	var err error
	if c.Etcd, err = f.etcd.config(); err != nil {
		return c, err
	}
	c.ListenEtcd = strings.TrimSuffix(strings.TrimPrefix(f.listenEtcd, "http://"), "/") // as etcd's own flags are written
	host, port, splitErr := net.SplitHostPort(c.ListenEtcd)
	number, portErr := strconv.Atoi(port)
	switch {
	case len(c.Etcd.Endpoints) > 0 && fs.Changed("listen-etcd"):
		return c, usagef("--listen-etcd is for the embedded etcd, --etcd-endpoints for another one: give one of the two")
	case splitErr != nil || host == "" || portErr != nil || number < 0 || number > 65535:
		return c, usagef("--listen-etcd %q is not host:port: write it as %s", f.listenEtcd, node.DefaultListenEtcd)
	case c.NetworkSet && (!f.network.IsValid() || !f.network.Addr().Is4()):
		return c, usagef("--network %v is not an IPv4 network: write it as %v", f.network, node.DefaultNetwork)
	case f.network.IsValid() && f.network != f.network.Masked():
		return c, usagef("--network %v has bits set beyond its length: did you mean %v?", f.network, f.network.Masked())
	case f.publicIP.IsValid() && !f.publicIP.Is4():
		return c, usagef("--public-ip %v is not an IPv4 address", f.publicIP)
	case f.publicIPv6.IsValid() && (!f.publicIPv6.Is6() || f.publicIPv6.Is4In6() || f.publicIPv6.IsLinkLocalUnicast()):
		return c, usagef("--public-ipv6 %v is not an IPv6 address that peers could send to", f.publicIPv6)
	case fs.Changed("port") && (f.port < 0 || f.port > 65535):
		return c, usagef("--port %d is not a port: use 1 to 65535, or 0 for any free one", f.port)
	case fs.Changed("lease-ttl") && f.leaseTTL < minLeaseTTL:
		return c, usagef("--lease-ttl %v is too short: use at least %v", f.leaseTTL, minLeaseTTL)
	case f.renewMargin < 1 || f.renewMargin > maxRenewMargin:
		return c, usagef("--subnet-lease-renew-margin %d: use 1 to %d minutes", f.renewMargin, maxRenewMargin)
	case f.healthzPort < 0 || f.healthzPort > 65535:
		return c, usagef("--healthz-port %d is not a port: use 1 to 65535, or 0 for none", f.healthzPort)
	case f.background && !f.replace:
		return c, usagef("--background goes with --replace: a supervisor runs the daemon otherwise")
	case c.NetworkSet && f.netConfigPath != "":
		return c, usagef("--network and --net-config-path both say which network to create: give one of the two")
	}
	if fs.Changed("subnet-lease-renew-margin") {
		c.RenewMargin = time.Duration(f.renewMargin) * time.Minute
	}
	healthzIP, err := netip.ParseAddr(f.healthzIP)
	if err != nil {
		return c, usagef("--healthz-ip %q is not an address: write it as 127.0.0.1", f.healthzIP)
	}
	if f.healthzPort > 0 {
		c.Healthz = netip.AddrPortFrom(healthzIP, uint16(f.healthzPort))
	}
	if f.netConfigPath != "" {
		if c.NetConfig, err = readFile(f.netConfigPath); err != nil {
			return c, fmt.Errorf("--net-config-path: %w", err)
		}
		if _, err := lease.ParseConfig(c.NetConfig); err != nil {
			return c, usagef("--net-config-path %s: %w", f.netConfigPath, err)
		}
	}
	for _, p := range f.ifaceRegex {
		if _, err := regexp.Compile(p); err != nil {
			return c, usagef("--iface-regex %q: %w", p, err)
		}
	}
	if f.ifaceCanReach != "" {
		if _, err := netip.ParseAddr(f.ifaceCanReach); err != nil {
			return c, usagef("--iface-can-reach %q is not an address: write it as 192.0.2.1", f.ifaceCanReach)
		}
	}
	for _, text := range f.outboundAddr {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return c, usagef("--outbound-addr %q is not an address: write it as 192.0.2.1 or 2001:db8::1", text)
		}
		c.OutboundAddrs = append(c.OutboundAddrs, addr)
	}
	if f.proxy != "" {
		at, err := localAddr(f.proxy)
		if err != nil {
			return c, usagef("--proxy %w", err)
		}
		if !at.Addr().IsValid() {
			at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
		}
		c.Proxy = at
	}
	if c.RuntimeDir, err = a.runtime(); err != nil {
		return c, err
	}
	if c.StateDir, err = a.state(); err != nil {
		return c, err
	}
	level := f.logLevel.value
	if f.verbosity > 0 && !fs.Changed("log-level") {
		level = "debug"
	}
	format := f.logFormat.value
	if a.output.value == outputJSON && !fs.Changed("log-format") {
		format = logJSON
	}
	c.Log = newLog(a.stderr, level, format)
	return c, nil
}

func newLog(w io.Writer, level, format string) *slog.Logger {
	opts := &slog.HandlerOptions{Level: map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
	}[level]}
	if format == logJSON {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// nodeRunner is a *node.Node, or a fake.
type nodeRunner interface {
	Run(ctx context.Context) error
}
