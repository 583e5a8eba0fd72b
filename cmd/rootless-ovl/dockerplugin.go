// What `up` serves docker with: its network and IPAM driver.

package main

import (
	"context"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/engine/docker"
	"github.com/rootless-ovl/rootless-ovl/node"
)

// serveDocker has dockerd find the driver and answers it until ctx ends. A socket that cannot be made costs the containers of docker alone, so the node goes on without.
func (a *app) serveDocker(ctx context.Context, c node.Config, eyes sight, listen func(string) (net.Listener, error)) error {
	ln, err := listen(docker.SocketName)
	if err != nil {
		c.Log.Warn("docker cannot use the overlay", "err", err)
		<-ctx.Done()
		return nil
	}
	defer ln.Close()
	client := api.NewClient(c.Socket())
	defer client.Close()
	var host string
	userDir := os.Getenv("XDG_RUNTIME_DIR")
	if filepath.IsAbs(userDir) {
		host = filepath.Join(userDir, "docker.sock") // of rootless dockerd, by default
	}
	d := docker.New(docker.Config{API: client, StateDir: c.StateDir, RuntimeDir: c.RuntimeDir, DockerHost: host, Look: eyes.dockerd, Log: c.Log})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if userDir != "" {
			a.dockerLink(ctx, eyes.link, c.Log)
		}
		return nil
	})
	g.Go(func() error { return d.Follow(ctx) })
	g.Go(func() error { return api.Serve(ctx, ln, d.Handler(), c.Log) })
	return g.Wait()
}
