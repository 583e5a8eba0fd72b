// The flags that say how to reach etcd, with flanneld's names; up and config share them.

package main

import (
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/node"
)

type etcdFlags struct {
	endpoints []string
	prefix    string
	cafile    string
	certfile  string
	keyfile   string
	username  string
	password  string
}

func (e *etcdFlags) register(cmd *cobra.Command, endpoints string) {
	fs := cmd.Flags()
	fs.StringSliceVar(&e.endpoints, "etcd-endpoints", nil, endpoints)
	fs.StringVar(&e.prefix, "etcd-prefix", node.DefaultEtcdPrefix, "`key` under which the network's keys are")
	fs.StringVar(&e.cafile, "etcd-cafile", "", "`file` (PEM) of the authority that signed etcd's certificate (default: the system's)")
	fs.StringVar(&e.certfile, "etcd-certfile", "", "`file` (PEM) of our certificate for etcd")
	fs.StringVar(&e.keyfile, "etcd-keyfile", "", "`file` (PEM) of the key of that certificate")
	fs.StringVar(&e.username, "etcd-username", "", "`user` for etcd")
	fs.StringVar(&e.password, "etcd-password", "", "`password` for etcd; ps shows it, so prefer env "+envEtcdPassword)
}

// files are those that are read again whenever a connection is made.
func (e *etcdFlags) files() []string {
	return slices.DeleteFunc([]string{e.cafile, e.certfile, e.keyfile}, func(f string) bool { return f == "" })
}

// config checks the flags against each other.
func (e *etcdFlags) config() (lease.ClientConfig, error) {
	c := lease.ClientConfig{
		Endpoints: e.endpoints,
		CAFile:    e.cafile,
		CertFile:  e.certfile,
		KeyFile:   e.keyfile,
		Username:  e.username,
		Password:  e.password,
	}
	if c.Password == "" && c.Username != "" {
		c.Password = os.Getenv(envEtcdPassword)
	}
	for _, e := range c.Endpoints {
		scheme, host, ok := strings.Cut(strings.TrimSpace(e), "://")
		if !ok {
			scheme, host = "http", scheme
		}
		if strings.Contains(host, "@") { // it would be shown by status, and is not what etcd asks for
			return c, usagef("--etcd-endpoints has a URL with a user in it: give --etcd-username, and the password in %s", envEtcdPassword)
		}
		if host == "" || !slices.Contains([]string{"http", "https", "unix", "unixs"}, scheme) {
			return c, usagef("--etcd-endpoints: %q is not the URL of an etcd: write it as http://192.0.2.1:2379 or https://...", e)
		}
	}
	switch {
	case (c.CertFile == "") != (c.KeyFile == ""):
		return c, usagef("--etcd-certfile and --etcd-keyfile belong together: give both")
	case c.Username != "" && c.Password == "":
		return c, usagef("--etcd-username without a password: set %s", envEtcdPassword)
	case c.Username == "" && c.Password != "":
		return c, usagef("--etcd-password without --etcd-username: give both")
	case len(c.Endpoints) == 0 && (c.CAFile != "" || c.CertFile != "" || c.Username != ""):
		return c, usagef("--etcd-cafile, --etcd-certfile and --etcd-username are for a cluster: name it with --etcd-endpoints")
	}
	return c, nil
}
