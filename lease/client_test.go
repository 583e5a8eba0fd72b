// This file tests the client: TLS in all its variants, user names, and errors that say what is wrong.

package lease_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/embedded"
)

// authority is a CA that lives in a directory.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newAuthority(t *testing.T) *authority {
	a := &authority{dir: t.TempDir(), next: 1}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.cert, a.key = a.sign(t, "ca", template)
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

// sign writes name.crt and name.key.
func (a *authority) sign(t *testing.T, name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template.SerialNumber = big.NewInt(a.next)
	a.next++
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	must(err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(err)
	must(os.WriteFile(a.path(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(os.WriteFile(a.path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
	cert, err := x509.ParseCertificate(der)
	must(err)
	return cert, key
}

func (a *authority) leaf(t *testing.T, name string) {
	a.sign(t, name, &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
}

func startEmbedded(t *testing.T, c embedded.Config) *embedded.Server {
	t.Helper()
	if c.DataDir == "" {
		c.DataDir = t.TempDir()
	}
	s, err := embedded.Start(testContext(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// try dials and reads the config, as a node does; success is ErrNoConfig.
func try(t *testing.T, c lease.ClientConfig) error {
	t.Helper()
	client, err := lease.Dial(testContext(t), c)
	if err != nil {
		return err
	}
	defer client.Close() //nolint:errcheck // a test's client
	_, err = lease.NewRegistry(client, "", nil).Config(testContext(t))
	return err
}

func TestDial_SpeaksTLS(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	for _, name := range []string{"server", "client"} {
		ca.leaf(t, name)
	}
	stranger.leaf(t, "client")
	listen := embedded.Config{ListenClient: "https://127.0.0.1:0", CertFile: ca.path("server.crt"), KeyFile: ca.path("server.key")}
	open := startEmbedded(t, listen)
	listen.ClientCAFile = ca.path("ca.crt")
	strict := startEmbedded(t, listen)
	plain := startEmbedded(t, embedded.Config{ListenClient: "http://127.0.0.1:0"})
	bare := strings.TrimPrefix(open.Endpoint(), "https://")

	for name, tc := range map[string]struct {
		endpoint      string
		ca, cert, key string
		want          error
		says          string
	}{
		"CA only":                          {open.Endpoint(), ca.path("ca.crt"), "", "", lease.ErrNoConfig, "/coreos.com/network/config"},
		"CA only, no scheme":               {bare, ca.path("ca.crt"), "", "", lease.ErrNoConfig, ""},
		"CA and client certificate":        {strict.Endpoint(), ca.path("ca.crt"), ca.path("client.crt"), ca.path("client.key"), lease.ErrNoConfig, ""},
		"certificate, not asked for":       {open.Endpoint(), ca.path("ca.crt"), ca.path("client.crt"), ca.path("client.key"), lease.ErrNoConfig, ""},
		"wrong CA":                         {open.Endpoint(), stranger.path("ca.crt"), "", "", lease.ErrTLS, open.Endpoint()},
		"system roots do not know it":      {open.Endpoint(), "", "", "", lease.ErrTLS, "certificate"},
		"client certificate missing":       {strict.Endpoint(), ca.path("ca.crt"), "", "", lease.ErrTLS, "certificate"},
		"client certificate of a stranger": {strict.Endpoint(), ca.path("ca.crt"), stranger.path("client.crt"), stranger.path("client.key"), lease.ErrTLS, ""},
		"https to a plain server":          {strings.Replace(plain.Endpoint(), "http:", "https:", 1), ca.path("ca.crt"), "", "", lease.ErrUnreachable, "http rather than https"},
		"http to a TLS server":             {strings.Replace(open.Endpoint(), "https:", "http:", 1), "", "", "", lease.ErrUnreachable, "https"},
		"http with a CA":                   {plain.Endpoint(), ca.path("ca.crt"), "", "", nil, "write https"},
		"certificate without key":          {open.Endpoint(), ca.path("ca.crt"), ca.path("client.crt"), "", nil, "key file"},
		"key of another certificate":       {open.Endpoint(), ca.path("ca.crt"), ca.path("client.crt"), ca.path("server.key"), nil, "client.crt"},
		"CA file absent":                   {open.Endpoint(), ca.path("none"), "", "", nil, ca.path("none")},
		"CA file is no certificate":        {open.Endpoint(), ca.path("ca.key"), "", "", nil, "no PEM certificate"},
		"another scheme":                   {"ftp://127.0.0.1:1", "", "", "", nil, "http or https"},
		"no host":                          {"http://", "", "", "", nil, "no host"},
	} {
		t.Run(name, func(t *testing.T) {
			err := try(t, lease.ClientConfig{Endpoints: []string{tc.endpoint}, CAFile: tc.ca, CertFile: tc.cert, KeyFile: tc.key})
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v; want %v with %q", err, tc.want, tc.says)
			}
			t.Log(err)
		})
	}

	t.Run("system roots", func(t *testing.T) {
		// The roots are read once in a process, so it takes another one.
		child := exec.CommandContext(testContext(t), os.Args[0], "-test.run=^TestDial_SystemRootsChild$")
		child.Env = append(os.Environ(), "SSL_CERT_FILE="+ca.path("ca.crt"), "TEST_ENDPOINT="+open.Endpoint())
		if out, err := child.CombinedOutput(); err != nil || !strings.Contains(string(out), "no network config") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

func TestDial_SystemRootsChild(t *testing.T) {
	endpoint := os.Getenv("TEST_ENDPOINT")
	if endpoint == "" {
		t.Skip("run by TestDial_SpeaksTLS")
	}
	if err := try(t, lease.ClientConfig{Endpoints: []string{endpoint}}); !errors.Is(err, lease.ErrNoConfig) {
		t.Fatal(err)
	} else if _, err := os.Stdout.WriteString(err.Error() + "\n"); err != nil {
		t.Fatal(err)
	}
}

func TestDial_SaysWhichAccessIsRefused(t *testing.T) {
	e := newProcess(t, cheapHashes...)
	e.start(t)
	enableAuth(t, e.client)
	for name, tc := range map[string]struct {
		user, password string
		want           error
	}{
		"right":          {"node", "secret", lease.ErrNoConfig},
		"wrong password": {"node", "guess", lease.ErrAuth},
		"no such user":   {"stranger", "secret", lease.ErrAuth},
		"no permission":  {"nobody", "secret", lease.ErrAuth},
		"no user":        {"", "", lease.ErrAuth},
		"no password":    {"node", "", lease.ErrAuth},
		"password alone": {"", "secret", nil},
	} {
		t.Run(name, func(t *testing.T) {
			err := try(t, lease.ClientConfig{Endpoints: []string{e.client}, Username: tc.user, Password: tc.password})
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "guess") {
				t.Errorf("error %v; want %v", err, tc.want)
			}
			t.Log(err)
		})
	}
}

func TestDial_UnreachableIsToldInTime(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // connects, and then says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	answering := func(answer func(net.Conn)) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ln.Close() })
		go func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				answer(conn)
				_ = conn.Close()
			}
		}()
		return ln.Addr().String()
	}
	hangsUp := answering(func(c net.Conn) { _, _ = c.Read(make([]byte, 4096)) })
	speaksTLS := answering(func(c net.Conn) { _ = tls.Server(c, &tls.Config{}).Handshake() })
	closed := freePort(t)
	const short = 300 * time.Millisecond
	for name, tc := range map[string]struct {
		c    lease.ClientConfig
		says string
	}{
		"refused":           {lease.ClientConfig{Endpoints: []string{closed}}, "connection refused"},
		"refused, two":      {lease.ClientConfig{Endpoints: []string{closed, "http://127.0.0.1:1"}}, closed + ",http://127.0.0.1:1"},
		"refused, password": {lease.ClientConfig{Endpoints: []string{closed}, Username: "u", Password: "p"}, "connection refused"},
		"silent":            {lease.ClientConfig{Endpoints: []string{"http://" + silent.Addr().String()}, Timeout: short}, "unreachable: no answer in time"},
		"silent, longer":    {lease.ClientConfig{Endpoints: []string{"http://" + silent.Addr().String()}, Timeout: 5 * short}, "unreachable: no answer in time"},
		"silent, password":  {lease.ClientConfig{Endpoints: []string{"http://" + silent.Addr().String()}, Timeout: short, Username: "u", Password: "p"}, "unreachable: no answer in time"},
		"silent, TLS":       {lease.ClientConfig{Endpoints: []string{"https://" + silent.Addr().String()}, Timeout: short}, "unreachable: no answer in time"},
		"hangs up":          {lease.ClientConfig{Endpoints: []string{"http://" + hangsUp}, Timeout: short}, "does it want https?"},
		"speaks TLS":        {lease.ClientConfig{Endpoints: []string{"http://" + speaksTLS}, Timeout: short}, "does it want https?"},
		"hangs up, TLS":     {lease.ClientConfig{Endpoints: []string{"https://" + hangsUp}, Timeout: short}, "does it speak http rather than https?"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := try(t, tc.c)
			if !errors.Is(err, lease.ErrUnreachable) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("error %v; want ErrUnreachable with %q", err, tc.says)
			}
			if strings.HasPrefix(name, "silent") && (strings.Contains(err.Error(), "does it") || strings.Contains(err.Error(), "closed network")) {
				t.Errorf("it guesses: %v", err)
			}
			t.Log(err)
		})
	}
	if _, err := lease.Dial(t.Context(), lease.ClientConfig{}); err == nil {
		t.Error("no endpoint, no error")
	}
}
