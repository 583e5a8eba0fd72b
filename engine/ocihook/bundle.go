// This file reads what a hook needs of the container's bundle: its config.json.

package ocihook

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	configName = "config.json"
	// maxConfig bounds it; in bytes.
	maxConfig = 16 << 20
)

// bundle is a container's configuration, as the engine wrote it.
type bundle struct {
	Root struct {
		Path string `json:"path"`
	} `json:"root"`
	Mounts []mount `json:"mounts"`
	Linux  struct {
		Namespaces []namespace `json:"namespaces"`
	} `json:"linux"`
}

type mount struct {
	Destination string `json:"destination"`
	Source      string `json:"source"`
}

type namespace struct {
	Type string `json:"type"`
	Path string `json:"path"` // empty: the runtime makes a new one
}

// readBundle reads the configuration in dir.
func readBundle(dir string) (bundle, error) {
	name := filepath.Join(dir, configName)
	f, err := os.Open(name)
	if err != nil {
		return bundle{}, fmt.Errorf("the container's configuration: %w: is the hook run by a runtime that keeps a bundle, as crun and runc do?", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return bundle{}, fmt.Errorf("the container's configuration %s: %w", name, err)
	}
	if len(b) > maxConfig {
		return bundle{}, api.Errorf(api.CodeInvalid, "%s is larger than %d bytes: give the container fewer mounts or a shorter environment", name, maxConfig)
	}
	c, err := parseBundle(b)
	if err != nil {
		return bundle{}, api.Errorf(api.CodeInvalid, "%s: %w", name, err)
	}
	if c.Root.Path != "" && !filepath.IsAbs(c.Root.Path) {
		c.Root.Path = filepath.Join(dir, c.Root.Path)
	}
	return c, nil
}

func parseBundle(b []byte) (bundle, error) {
	var c bundle
	if err := json.Unmarshal(b, &c); err != nil {
		return bundle{}, fmt.Errorf("it is not the configuration of an OCI container: %w", err)
	}
	return c, nil
}

// network is the container's network namespace, as far as the configuration tells; ok is false where it is the runtime's own.
func (c bundle) network() (ns namespace, ok bool) {
	i := slices.IndexFunc(c.Linux.Namespaces, func(n namespace) bool { return n.Type == "network" })
	if i < 0 {
		return namespace{}, false
	}
	return c.Linux.Namespaces[i], true
}

// holder is the process whose namespace the container shares, as engines name that of another container; 0 where it has one of its own.
func (c bundle) holder() int {
	ns, _ := c.network()
	number, found := strings.CutPrefix(path.Clean(ns.Path), "/proc/")
	number, net := strings.CutSuffix(number, "/ns/net")
	pid, err := strconv.ParseUint(number, 10, 31)
	if !found || !net || err != nil {
		return 0
	}
	return int(pid)
}

// overResolvConf is the mount that the container sees at resolvConf, if there is one there or above; the last one made hides others.
func (c bundle) overResolvConf() (mount, bool) {
	for _, m := range slices.Backward(c.Mounts) {
		for at := resolvConf; at != "/"; at = path.Dir(at) {
			if path.Clean(m.Destination) == at {
				return m, true
			}
		}
	}
	return mount{}, false
}

// isEngines tells whether a resolv.conf is where podman and CRI-O keep the one that they mount into a container, or into all of a pod:
// .../ID/userdata/resolv.conf. Another file is the user's.
func isEngines(resolvConf string) bool {
	dir, found := strings.CutSuffix(resolvConf, "/userdata/resolv.conf")
	return found && isStoreID(path.Base(dir))
}

// engineMakesNetwork tells whether the engine gives the container a network of its own only after this hook, as podman does where the container
// has a user namespace of its own: it has made a resolv.conf, which it does for a container with a network alone.
func (c bundle) engineMakesNetwork() bool {
	ns, ok := c.network()
	m, mounted := c.overResolvConf()
	return ok && ns.Path == "" && mounted && isEngines(m.Source)
}
