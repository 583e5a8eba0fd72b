// This file runs Debian's etcd-server on a host, with and without TLS, and reaches into an etcd as an operator would.

package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// Etcd is a running etcd server that is not ours.
type Etcd struct {
	Host     *Host
	Endpoint string // URL
	Addr     netip.AddrPort

	name string
	dir  string // of its data
	args []string
	cmd  *exec.Cmd
	done chan struct{}
}

// HaveEtcd says whether Debian's etcd-server is installed; etcd prints why not.
func HaveEtcd() error {
	if _, err := exec.LookPath("etcd"); err != nil {
		return fmt.Errorf("etcd is not installed: apt-get install etcd-server")
	}
	return nil
}

// Etcd starts an etcd server on the host. With certs it speaks TLS; with clientAuth it asks for a client certificate.
func (h *Host) Etcd(certs *Certs, clientAuth bool) *Etcd {
	h.lab.t.Helper()
	return h.etcd("etcd", 2379, certs, clientAuth, "--listen-peer-urls", "http://127.0.0.1:0")
}

// AnotherEtcd starts a server beside the one of Etcd, on a port of its own and with nothing in it. To etcd, which goes by its default
// settings here, the two are the same cluster with the same member.
func (h *Host) AnotherEtcd(port uint16) *Etcd {
	h.lab.t.Helper()
	return h.etcd(fmt.Sprintf("etcd%d", port), port, nil, false, "--listen-peer-urls", "http://127.0.0.1:0")
}

// EtcdCluster starts a cluster with a member on each host. Members talk to each other over addresses of their own, so that they can be
// cut off from each other alone.
func EtcdCluster(hosts ...*Host) []*Etcd {
	t := hosts[0].lab.t
	t.Helper()
	var urls, initial []string
	for i, h := range hosts {
		url := fmt.Sprintf("http://%v:2380", h.peerAddr())
		urls = append(urls, url)
		initial = append(initial, fmt.Sprintf("m%d=%s", i, url))
		must(t, "address of an etcd member", h.AddAddr("lan0", netip.PrefixFrom(h.peerAddr(), LAN.Bits())))
	}
	var members []*Etcd
	var started sync.WaitGroup
	for i, h := range hosts {
		members = append(members, h.etcdNotStarted(fmt.Sprintf("m%d", i), 2379, nil, false, "--listen-peer-urls", urls[i],
			"--initial-advertise-peer-urls", urls[i], "--initial-cluster", strings.Join(initial, ",")))
	}
	for _, e := range members {
		started.Go(e.Start)
	}
	started.Wait()
	return members
}

// peerAddr is where an etcd member of the host talks to others.
func (h *Host) peerAddr() netip.Addr {
	b := h.Addr.As4()
	b[3] += 100
	return netip.AddrFrom4(b)
}

// CutOff keeps the member's host and those of others from reaching each other's members; Mend ends that.
func (e *Etcd) CutOff(others ...*Etcd) { e.toOthers(others, (*Space).Blackhole) }

// Mend undoes CutOff.
func (e *Etcd) Mend(others ...*Etcd) { e.toOthers(others, (*Space).Unblackhole) }

func (e *Etcd) toOthers(others []*Etcd, do func(*Space, netip.Prefix) error) {
	e.Host.lab.t.Helper()
	for _, o := range others {
		must(e.Host.lab.t, "between etcd members", errors.Join(
			do(e.Host.Space, netip.PrefixFrom(o.Host.peerAddr(), 32)), do(o.Host.Space, netip.PrefixFrom(e.Host.peerAddr(), 32))))
	}
}

func (h *Host) etcd(name string, port uint16, certs *Certs, clientAuth bool, more ...string) *Etcd {
	h.lab.t.Helper()
	e := h.etcdNotStarted(name, port, certs, clientAuth, more...)
	e.Start()
	return e
}

func (h *Host) etcdNotStarted(name string, port uint16, certs *Certs, clientAuth bool, more ...string) *Etcd {
	t := h.lab.t
	t.Helper()
	addr := netip.AddrPortFrom(h.Addr, port)
	scheme := "http"
	e := &Etcd{Host: h, Addr: addr, name: name, dir: filepath.Join(h.Dir, name)}
	e.args = append(more, "--data-dir", e.dir, "--name", name, "--logger", "zap", "--log-level", "error")
	if certs != nil {
		scheme = "https"
		e.args = append(e.args, "--cert-file", certs.ServerCert, "--key-file", certs.ServerKey)
		if clientAuth {
			e.args = append(e.args, "--client-cert-auth", "--trusted-ca-file", certs.CA)
		}
	}
	e.Endpoint = scheme + "://" + addr.String()
	e.args = append(e.args, "--listen-client-urls", e.Endpoint, "--advertise-client-urls", e.Endpoint)
	t.Cleanup(e.Stop)
	return e
}

// Wipe removes the data of a server that is stopped.
func (e *Etcd) Wipe() { must(e.Host.lab.t, "wiping "+e.name, os.RemoveAll(e.dir)) }

// Save copies the data of a server that is stopped; what it returns puts the copy in their place, when it is stopped again.
func (e *Etcd) Save() (restore func()) {
	t, saved := e.Host.lab.t, e.dir+"-saved"
	uid, gid, _ := hostUser()
	replace := func(to, from string) {
		must(t, "copying the data of "+e.name, errors.Join(os.RemoveAll(to), os.CopyFS(to, os.DirFS(from)), os.Chmod(to, 0o700), chownTree(to, uid, gid)))
	}
	replace(saved, e.dir)
	return func() { replace(e.dir, saved) }
}

// HaveEtcdctl says whether etcd's tool is there, which may not come with the server.
func HaveEtcdctl() error {
	if _, err := exec.LookPath("etcdctl"); err != nil {
		return fmt.Errorf("etcdctl is not installed: apt-get install etcd-client")
	}
	return nil
}

// Snapshot saves a running server's data with etcdctl; what it returns restores them likewise, into a new cluster, when it is stopped.
func (e *Etcd) Snapshot() (restore func()) {
	t, file := e.Host.lab.t, e.dir+".snapshot"
	t.Helper()
	etcdctl := func(args ...string) {
		t.Helper()
		r := e.Host.RunWith(func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "ETCDCTL_API=3") }, "etcdctl", args...)
		if r.Code != 0 {
			t.Fatalf("etcdctl %v: %s%s", args, r.Stdout, r.Stderr)
		}
	}
	etcdctl("--endpoints", e.Endpoint, "snapshot", "save", file)
	return func() {
		e.Wipe()
		etcdctl("snapshot", "restore", file, "--data-dir", e.dir, "--name", e.name, "--initial-cluster", e.name+"=http://localhost:2380")
	}
}

// Start starts the server, again after a Stop, with the data it had.
func (e *Etcd) Start() {
	t := e.Host.lab.t
	t.Helper()
	log, err := os.OpenFile(e.Host.LogPath(e.name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	must(t, "etcd log", err)
	defer log.Close()
	e.cmd = e.Host.Command("etcd", e.args...)
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.done = make(chan struct{})
	must(t, "etcd", e.Host.Start(e.cmd))
	go func(cmd *exec.Cmd, done chan struct{}) {
		defer close(done)
		_ = cmd.Wait()
	}(e.cmd, e.done)
	Eventually(t, "etcd accepts connections", func() bool {
		select {
		case <-e.done:
			b, _ := os.ReadFile(e.Host.LogPath(e.name))
			t.Fatalf("etcd ended at once:\n%s", b)
		default:
		}
		conn, err := e.Host.DialContext(t.Context(), "tcp", e.Addr.String())
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
}

// Stop ends the server; its data stays.
func (e *Etcd) Stop() {
	if e.cmd == nil {
		return // it was never started
	}
	stop(e.cmd.Process, unix.SIGTERM, e.done, 15*time.Second)
}

// Freeze stops the server's process without ending it; connections to it hang. Thaw lets it go on.
func (e *Etcd) Freeze() { _ = e.cmd.Process.Signal(unix.SIGSTOP) }

// Thaw undoes Freeze.
func (e *Etcd) Thaw() { _ = e.cmd.Process.Signal(unix.SIGCONT) }

// EtcdClient is an operator's client of the etcd at endpoint (URL), dialled from the space. It is closed with the test.
func (s *Space) EtcdClient(t T, endpoint string) *clientv3.Client {
	t.Helper()
	return s.EtcdClientTLS(t, endpoint, nil)
}

// EtcdClientTLS is EtcdClient with a client certificate, read anew for each connection.
func (s *Space) EtcdClientTLS(t T, endpoint string, certs *Certs) *clientv3.Client {
	t.Helper()
	var tlsConfig *tls.Config
	if certs != nil {
		ca, err := os.ReadFile(certs.CA)
		must(t, "etcd client", err)
		tlsConfig = &tls.Config{RootCAs: x509.NewCertPool(), GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(certs.ClientCert, certs.ClientKey)
			return &cert, err
		}}
		tlsConfig.RootCAs.AppendCertsFromPEM(ca)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{endpoint}, DialTimeout: 10 * time.Second, Logger: zap.NewNop(), TLS: tlsConfig,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			address = strings.TrimPrefix(strings.TrimPrefix(address, "http://"), "https://")
			return s.DialContext(ctx, "tcp", address)
		})},
	})
	must(t, "etcd client", err)
	t.Cleanup(func() { client.Close() })
	return client
}

// Certs are the files of a small PKI: an authority, a server certificate for a host's address and a client certificate.
type Certs struct {
	CA, ServerCert, ServerKey, ClientCert, ClientKey string

	renew func(lives time.Duration)
}

// Renew replaces the certificate files in place by ones that end so long from now; in the past for less than 0. The authority stays.
func (c *Certs) Renew(lives time.Duration) { c.renew(lives) }

// NewCerts makes certificates for a server on the host.
func (h *Host) NewCerts() *Certs {
	t := h.lab.t
	t.Helper()
	dir := filepath.Join(h.Dir, "pki")
	must(t, "pki", os.Mkdir(dir, 0o700))
	caKey, ca := h.certificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: "lab authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		must(t, "pki", os.WriteFile(path+".new", pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		must(t, "pki", os.Rename(path+".new", path))
		return path
	}
	key := func(name string, k *ecdsa.PrivateKey) string {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		must(t, "pki", err)
		return write(name, "PRIVATE KEY", der)
	}
	c := &Certs{CA: write("ca.pem", "CERTIFICATE", ca.Raw)}
	c.renew = func(lives time.Duration) {
		serverKey, server := h.certificate(&x509.Certificate{
			Subject: pkix.Name{CommonName: "server"}, IPAddresses: []net.IP{h.Addr.AsSlice()}, NotAfter: time.Now().Add(lives),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, ca, caKey)
		clientKey, client := h.certificate(&x509.Certificate{
			Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(lives),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}, ca, caKey)
		c.ServerCert, c.ServerKey = write("server.pem", "CERTIFICATE", server.Raw), key("server.key", serverKey)
		c.ClientCert, c.ClientKey = write("client.pem", "CERTIFICATE", client.Raw), key("client.key", clientKey)
	}
	c.Renew(24 * time.Hour)
	return c
}

// certificate signs template with the parent's key, or with its own when there is no parent.
func (h *Host) certificate(template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t := h.lab.t
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, "pki", err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-time.Hour)
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(24 * time.Hour)
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	must(t, "pki", err)
	cert, err := x509.ParseCertificate(der)
	must(t, "pki", err)
	return key, cert
}
