// rootless-ovl doctor: why it may not work on this host.

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/engine/install"
	"github.com/rootless-ovl/rootless-ovl/internal/doctor"
	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/node"
)

// daemonPatience bounds what doctor waits for the daemon to say where store and peers are.
const daemonPatience = 5 * time.Second

type doctorFlags struct {
	endpoints []string
	cafile    string
	certfile  string
	keyfile   string
	network   netip.Prefix
}

func (a *app) doctorCommand() *cobra.Command {
	var f doctorFlags
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is in the way on this host",
		Long: `Look for every cause we know of why the overlay may not work on this host, and print the remedy of each. Nothing is changed,
and no daemon is needed; a running one is asked for the network, the store and the peers to look at.

Exit status 1 when a check fails.`,
		Example: `  rootless-ovl doctor
  rootless-ovl doctor --etcd-endpoints http://192.0.2.1:2379 --network 10.5.0.0/16
  rootless-ovl doctor -o json | jq '.[] | select(.status == "fail")'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := a.doctorOptions(cmd.Context(), f)
			if err != nil {
				return err
			}
			checks := a.diagnose(cmd.Context(), o)
			if err := a.print(checks, func(w io.Writer) { doctorText(w, checks) }); err != nil {
				return err
			}
			if doctor.Failed(checks) {
				return exitStatus(exitFailed) // the checks have said why
			}
			return nil
		},
	}
	fs := cmd.Flags()
	fs.StringSliceVar(&f.endpoints, "etcd-endpoints", nil, "`URL`s of etcd, repeated or separated by commas (default: the running daemon's)")
	fs.StringVar(&f.cafile, "etcd-cafile", "", "`file` (PEM) of the authority that signed etcd's certificate (default: the system's)")
	fs.StringVar(&f.certfile, "etcd-certfile", "", "`file` (PEM) of our certificate for etcd")
	fs.StringVar(&f.keyfile, "etcd-keyfile", "", "`file` (PEM) of the key of that certificate")
	fs.TextVar(&f.network, "network", netip.Prefix{}, fmt.Sprintf("network as `CIDR` (default: the running daemon's, or %v)", node.DefaultNetwork))
	return cmd
}

// doctorOptions is what the flags say, and for the rest what the daemon says, if there is one.
func (a *app) doctorOptions(ctx context.Context, f doctorFlags) (doctor.Options, error) {
	o := doctor.Options{Network: f.network, Endpoints: f.endpoints}
	var err error
	if o.TLS, err = f.tls(); err != nil {
		return o, err
	}
	status, peers, err := a.askDaemon(ctx)
	o.Daemon = &doctor.Daemon{Err: err, Version: status.Version, Ours: thisBuild().Version, SandboxOff: status.Sandbox.Off}
	if o.Installed, err = a.installSetup(ctx); err != nil {
		o.Installed = install.Setup{} // directories are missing, which has a check of its own
	}
	if len(o.Endpoints) == 0 {
		for _, e := range status.Store.Endpoints {
			// Only the daemon knows its certificates: without them this would be a false alarm.
			if !strings.HasPrefix(e, "https://") || o.TLS != nil {
				o.Endpoints = append(o.Endpoints, e)
			}
		}
	}
	if !o.Network.IsValid() {
		if o.Network, err = netip.ParsePrefix(status.Network); err != nil {
			o.Network = node.DefaultNetwork
		}
	}
	for _, p := range peers {
		if addr, err := netip.ParseAddr(p.PublicIP); err == nil && p.Port > 0 && p.Port <= 65535 {
			o.Peers = append(o.Peers, netip.AddrPortFrom(addr, uint16(p.Port)))
		}
	}
	return o, nil
}

// askDaemon gives nothing where no daemon answers: doctor is for that case too.
func (a *app) askDaemon(ctx context.Context) (api.Status, []api.Peer, error) {
	c, err := a.client()
	if err != nil {
		return api.Status{}, nil, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, daemonPatience)
	defer cancel()
	status, err := c.Status(ctx)
	if err != nil {
		return api.Status{}, nil, err
	}
	peers, err := c.Peers(ctx)
	if err != nil {
		return status, nil, nil // status is what matters
	}
	return status, peers, nil
}

// tls is nil where no file is given.
func (f doctorFlags) tls() (*tls.Config, error) {
	if f.cafile == "" && f.certfile == "" && f.keyfile == "" {
		return nil, nil
	}
	if (f.certfile == "") != (f.keyfile == "") {
		return nil, usagef("--etcd-certfile and --etcd-keyfile belong together: give both")
	}
	c, err := lease.ClientConfig{CAFile: f.cafile, CertFile: f.certfile, KeyFile: f.keyfile}.TLS()
	if err != nil {
		return nil, fmt.Errorf("--etcd-cafile, --etcd-certfile, --etcd-keyfile: %w", err)
	}
	return c, nil
}

// doctorText is the table of all checks, then the remedies, which may have several lines.
func doctorText(w io.Writer, checks []doctor.Check) {
	row(w, "STATUS", "CHECK", "FOUND")
	count := map[doctor.Status]int{}
	for _, c := range checks {
		row(w, string(c.Status), c.Title, c.Detail)
		count[c.Status]++
	}
	for _, c := range checks {
		if c.Remedy == "" {
			continue
		}
		fmt.Fprintf(w, "\n%s: %s\n", c.Status, c.Title)
		for line := range strings.Lines(c.Remedy) {
			fmt.Fprintf(w, "    %s\n", strings.TrimRight(line, "\n"))
		}
	}
	fmt.Fprintf(w, "\n%d ok, %d warn, %d fail, %d skipped\n", count[doctor.OK], count[doctor.Warn], count[doctor.Fail], count[doctor.Skipped])
}
