// This file is subnet.env, by which flannel tells docker, CNI plugins and its own next start what it leased
// (pkg/subnet/subnet.go WriteSubnetFile, Documentation/running.md):
//
//	FLANNEL_NETWORK=10.5.0.0/16
//	FLANNEL_SUBNET=10.5.72.1/24               first address of the subnet, not the subnet
//	FLANNEL_IPV6_NETWORK=2001:cafe:42::/56    dual-stack only
//	FLANNEL_IPV6_SUBNET=2001:cafe:42::1/64    dual-stack only
//	FLANNEL_MTU=1472
//	FLANNEL_IPMASQ=false

package lease

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// SubnetEnv is the content of subnet.env. Subnets are masked prefixes; the file holds their first address. The IPv6
// prefixes are zero unless the network is dual-stack.
type SubnetEnv struct {
	Network, Subnet         netip.Prefix
	IPv6Network, IPv6Subnet netip.Prefix
	MTU                     int // bytes
	IPMasq                  bool
	IPMasqAbsent            bool // a file that was read, and people had edited, does not have the line
}

// Bytes is the file as flannel writes it.
func (e SubnetEnv) Bytes() []byte {
	first := func(p netip.Prefix) netip.Prefix {
		if !p.IsValid() {
			return p
		}
		return netip.PrefixFrom(p.Masked().Addr().Next(), p.Bits())
	}
	var b []byte
	line := func(name string, p netip.Prefix) {
		if p.IsValid() {
			b = fmt.Appendf(b, "%s=%v\n", name, p)
		}
	}
	line("FLANNEL_NETWORK", e.Network)
	line("FLANNEL_SUBNET", first(e.Subnet))
	line("FLANNEL_IPV6_NETWORK", e.IPv6Network)
	line("FLANNEL_IPV6_SUBNET", first(e.IPv6Subnet))
	b = fmt.Appendf(b, "FLANNEL_MTU=%d\n", e.MTU)
	if !e.IPMasqAbsent {
		b = fmt.Appendf(b, "FLANNEL_IPMASQ=%t\n", e.IPMasq)
	}
	return b
}

// WriteSubnetEnv replaces the file at path in one step, mode 0644 whatever the umask, making its directory (0755) if
// need be. A reader sees the old file or the new one.
func WriteSubnetEnv(path string, e SubnetEnv) error {
	if err := writeFile(path, e.Bytes()); err != nil {
		return fmt.Errorf("writing the subnet file: %w", err)
	}
	return nil
}

func writeFile(path string, b []byte) (err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// ReadSubnetEnv reads the file at path. A file that is not there gives an error that matches fs.ErrNotExist.
func ReadSubnetEnv(path string) (SubnetEnv, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO would be waited for
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("reading the subnet file: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return SubnetEnv{}, fmt.Errorf("reading the subnet file: %s is not a plain file: move it away", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxValue+1))
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("reading the subnet file: %w", err)
	}
	e, err := ParseSubnetEnv(b)
	if err != nil {
		return SubnetEnv{}, fmt.Errorf("subnet file %s: %w", path, err)
	}
	return e, nil
}

// ParseSubnetEnv reads what Bytes writes. Comments, blank lines, unknown names, quotes around values and a leading
// "export" are allowed, because people edit the file; of several networks separated by commas the first is taken. What the file does
// not have stays zero: flannel's own readers ask for no more than they use.
func ParseSubnetEnv(b []byte) (SubnetEnv, error) {
	if len(b) > MaxValue {
		return SubnetEnv{}, fmt.Errorf("over %d bytes", MaxValue)
	}
	e := SubnetEnv{IPMasqAbsent: true}
	for i, line := range bytes.Split(b, []byte("\n")) {
		s := strings.TrimSpace(string(line))
		if s == "" || s[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimPrefix(s, "export "), "=")
		if !ok {
			return SubnetEnv{}, fmt.Errorf("line %d is not NAME=value", i+1)
		}
		value = strings.Trim(strings.TrimSpace(value), `"'`)
		var err error
		switch strings.TrimSpace(name) {
		case "FLANNEL_NETWORK":
			value, _, _ = strings.Cut(value, ",")
			e.Network, err = maskedPrefix(value, 32)
		case "FLANNEL_SUBNET":
			e.Subnet, err = maskedPrefix(value, 32)
		case "FLANNEL_IPV6_NETWORK":
			value, _, _ = strings.Cut(value, ",")
			e.IPv6Network, err = maskedPrefix(value, 128)
		case "FLANNEL_IPV6_SUBNET":
			e.IPv6Subnet, err = maskedPrefix(value, 128)
		case "FLANNEL_MTU":
			e.MTU, err = strconv.Atoi(value)
			if err != nil || e.MTU < 0 || e.MTU > 65535 {
				err = fmt.Errorf("FLANNEL_MTU %.64q is not an MTU", value)
			}
		case "FLANNEL_IPMASQ":
			e.IPMasqAbsent = false
			if e.IPMasq, err = strconv.ParseBool(value); err != nil {
				err = fmt.Errorf("FLANNEL_IPMASQ %.64q is not true or false", value)
			}
		}
		if err != nil {
			return SubnetEnv{}, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	return e, nil
}

func maskedPrefix(s string, bits int) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("%.64q is not an address and a length, as in 10.5.72.1/24", s)
	}
	if p.Addr().BitLen() != bits || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%v is of the wrong address family", p)
	}
	return p.Masked(), nil
}
