// This file runs Debian's etcd-server on a host, with and without TLS, and reaches into an etcd as an operator would.

package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	t := h.lab.t
	t.Helper()
	addr := netip.AddrPortFrom(h.Addr, 2379)
	scheme := "http"
	e := &Etcd{Host: h, Addr: addr}
	dir := filepath.Join(h.Dir, "etcd")
	e.args = []string{"--data-dir", dir, "--name", "lab", "--listen-peer-urls", "http://127.0.0.1:0", "--logger", "zap", "--log-level", "error"}
	if certs != nil {
		scheme = "https"
		e.args = append(e.args, "--cert-file", certs.ServerCert, "--key-file", certs.ServerKey)
		if clientAuth {
			e.args = append(e.args, "--client-cert-auth", "--trusted-ca-file", certs.CA)
		}
	}
	e.Endpoint = scheme + "://" + addr.String()
	e.args = append(e.args, "--listen-client-urls", e.Endpoint, "--advertise-client-urls", e.Endpoint)
	e.Start()
	t.Cleanup(e.Stop)
	return e
}

// Start starts the server, again after a Stop, with the data it had.
func (e *Etcd) Start() {
	t := e.Host.lab.t
	t.Helper()
	log, err := os.OpenFile(e.Host.LogPath("etcd"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
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
			b, _ := os.ReadFile(e.Host.LogPath("etcd"))
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
func (e *Etcd) Stop() { stop(e.cmd.Process, unix.SIGTERM, e.done, 15*time.Second) }

// Freeze stops the server's process without ending it; connections to it hang. Thaw lets it go on.
func (e *Etcd) Freeze() { _ = e.cmd.Process.Signal(unix.SIGSTOP) }

// Thaw undoes Freeze.
func (e *Etcd) Thaw() { _ = e.cmd.Process.Signal(unix.SIGCONT) }

// EtcdClient is an operator's client of the etcd at endpoint (URL), dialled from the space. It is closed with the test.
func (s *Space) EtcdClient(t T, endpoint string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{endpoint}, DialTimeout: 10 * time.Second, Logger: zap.NewNop(),
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
}

// NewCerts makes certificates for a server on the host.
func (h *Host) NewCerts() *Certs {
	t := h.lab.t
	t.Helper()
	dir := filepath.Join(h.Dir, "pki")
	must(t, "pki", os.Mkdir(dir, 0o700))
	caKey, ca := h.certificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: "lab authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	serverKey, server := h.certificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: "server"}, IPAddresses: []net.IP{h.Addr.AsSlice()},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, ca, caKey)
	clientKey, client := h.certificate(&x509.Certificate{
		Subject:  pkix.Name{CommonName: "node"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, ca, caKey)
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		must(t, "pki", os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	key := func(name string, k *ecdsa.PrivateKey) string {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		must(t, "pki", err)
		return write(name, "PRIVATE KEY", der)
	}
	return &Certs{
		CA:         write("ca.pem", "CERTIFICATE", ca.Raw),
		ServerCert: write("server.pem", "CERTIFICATE", server.Raw), ServerKey: key("server.key", serverKey),
		ClientCert: write("client.pem", "CERTIFICATE", client.Raw), ClientKey: key("client.key", clientKey),
	}
}

// certificate signs template with the parent's key, or with its own when there is no parent.
func (h *Host) certificate(template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t := h.lab.t
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, "pki", err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(24 * time.Hour)
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	must(t, "pki", err)
	cert, err := x509.ParseCertificate(der)
	must(t, "pki", err)
	return key, cert
}
