// This file is what the daemon keeps on disk: the directories and their locks, the node id, the attachments and the
// last known leases (and vxlan.go's MAC address). Every file is written whole to a temporary name, synced and renamed.

package node

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/lease"
)

// ErrLocked says that another daemon uses the state directory.
var ErrLocked = errors.New("directory is in use")

// Names below the state directory.
const (
	lockFile        = "lock"
	nodeIDFile      = "node-id"
	vtepMACFile     = "vtep-mac"
	attachmentsFile = "attachments.json"
	lastFile        = "last-known.json"
	etcdDir         = "etcd"
)

// openStateDir makes dir (mode 0700) if it is absent, checks that it is ours alone, and locks it until the returned file
// is closed or the process ends. The error of a directory that is in use is ErrLocked and names the other daemon's pid.
func openStateDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w; choose another with --state-dir", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, fmt.Errorf("state directory %s: %w", dir, err)
	}
	if int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("state directory %s belongs to uid %d, not to you (uid %d): choose your own with --state-dir",
			dir, st.Uid, os.Geteuid())
	}
	if st.Mode&0o077 != 0 {
		return nil, fmt.Errorf("state directory %s is open to other users (mode %04o): run `chmod 700 %s`", dir, st.Mode&0o777, dir)
	}
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w: move %s away", err, path)
	}
	if err := checkOwn(f, path); err != nil {
		f.Close()
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		owner := "another rootless-ovl daemon"
		if pid := strings.TrimSpace(readShort(f)); pid != "" {
			owner += " (pid " + pid + ")"
		}
		return nil, fmt.Errorf("state %w: %s is used by %s: stop it first, or give this one its own --state-dir and --runtime-dir",
			ErrLocked, dir, owner)
	}
	if err := errors.Join(f.Truncate(0), writeAt0(f, fmt.Sprintf("%d\n", os.Getpid()))); err != nil {
		f.Close()
		return nil, fmt.Errorf("write %s: %w", path, err)
	}
	return f, nil
}

func readShort(f *os.File) string {
	b := make([]byte, 32)
	n, _ := f.ReadAt(b, 0)
	return string(b[:n])
}

func writeAt0(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// writeFile replaces path with data, mode 0600: after a crash there is the old content or the new, never a part.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, plain(err))
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the error of the write is the one to tell
		return fmt.Errorf("write %s: %w", path, plain(err))
	}
	return nil
}

// plain is err without the operation and the names of temporary files, where whoever tells of it names the real one.
func plain(err error) error {
	var p *fs.PathError
	var l *os.LinkError
	switch {
	case errors.As(err, &p):
		return p.Err
	case errors.As(err, &l):
		return l.Err
	}
	return err
}

// nodeID reads the node's id from dir, or makes one: 128 random bits in hexadecimal.
func nodeID(dir string) (string, error) {
	path := filepath.Join(dir, nodeIDFile)
	b, err := readOwn(path, maxWordFile)
	if errors.Is(err, fs.ErrNotExist) {
		var raw [16]byte
		rand.Read(raw[:])
		id := hex.EncodeToString(raw[:])
		return id, writeFile(path, []byte(id+"\n"))
	}
	if err != nil {
		return "", fmt.Errorf("node id: %w", err)
	}
	id := strings.TrimSpace(string(b))
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != 16 {
		return "", fmt.Errorf("node id: %s does not hold 32 hexadecimal digits; restore it, or remove it to become a new node (the old lease then stays until it expires)", path)
	}
	return id, nil
}

// readState decodes a state file into v. found is false if there is none. A file that cannot be decoded is moved aside,
// never overwritten, and the error names where to. What is no file of ours stays where it is, unread.
func readState(path string, v any) (found bool, err error) {
	b, err := readOwn(path, maxStateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read state: %w", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		aside := path + ".broken"
		for i := 1; ; i++ {
			if _, serr := os.Lstat(aside); errors.Is(serr, fs.ErrNotExist) {
				break
			}
			aside = fmt.Sprintf("%s.broken.%d", path, i)
		}
		if rerr := os.Rename(path, aside); rerr != nil {
			return false, fmt.Errorf("%s is not readable (%w) and cannot be moved aside: %w", path, err, rerr)
		}
		return false, &brokenStateError{path: path, aside: aside, err: err}
	}
	return true, nil
}

// brokenStateError tells of a state file that was moved aside; the daemon goes on without it.
type brokenStateError struct {
	path, aside string
	err         error
}

func (e *brokenStateError) Error() string {
	return fmt.Sprintf("%s is broken (%v); it was kept as %s", e.path, e.err, e.aside)
}

func (e *brokenStateError) Unwrap() error { return e.err }

func writeState(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return writeFile(path, append(b, '\n'))
}

// savedAttachments is attachments.json.
type savedAttachments struct {
	V           int               `json:"v"`
	Boot        string            `json:"boot,omitempty"` // of the host, by which it was written: another has none of the containers
	LastAddr    netip.Addr        `json:"last_addr"`      // where giving out addresses goes on
	Attachments []savedAttachment `json:"attachments"`
	Reserved    []savedAddress    `json:"reserved,omitempty"`
}

// savedAttachment is one attachment as it is kept on disk: what is needed to find its TAP again.
type savedAttachment struct {
	Name      string       `json:"name"`
	PID       int          `json:"pid,omitempty"`
	StartTime uint64       `json:"start_time,omitempty"` // of PID, in clock ticks since boot: tells a reused pid apart
	Netns     string       `json:"netns,omitempty"`      // path; set for --netns attachments
	Inode     uint64       `json:"inode"`                // of the network namespace; all that is known of it with neither PID nor Netns
	Owner     string       `json:"owner,omitempty"`
	IfName    string       `json:"ifname"`
	Addr      netip.Prefix `json:"addr"`           // address with the subnet's length
	Addr6     netip.Prefix `json:"addr6,omitzero"` // likewise in a dual-stack network
	MAC       string       `json:"mac"`
	MTU       int          `json:"mtu,omitempty"` // that its interface was given, bytes; 0: not known
	NoDefault bool         `json:"no_default_route,omitempty"`
	Gateway   bool         `json:"gateway,omitempty"` // of all of Addr's subnet
	Since     time.Time    `json:"since"`
	Named     bool         `json:"named,omitempty"` // Name was asked for, and is published
	Aliases   []string     `json:"aliases,omitempty"`
	Ports     []savedPort  `json:"ports,omitempty"`   // published
	NoIPv6    bool         `json:"no_ipv6,omitempty"` // it was to have no IPv6 address
	DNSAt     []string     `json:"dns_at,omitempty"`
	// Of one that was made for somebody to take: Inode and IfName are where it was last seen, Home where it was made.
	// Mark is its interface's alias, which tells it wherever it is; "" of a version that gave none.
	Loose bool      `json:"loose,omitempty"`
	Home  savedHome `json:"home,omitzero"`
	Mark  string    `json:"mark,omitempty"`
	// Entered tells, of one that is known by its namespace's number alone or is loose, whether a process has been seen in its namespace.
	Entered bool `json:"entered,omitempty"`
	api.Policy
}

// savedLast is last-known.json: enough to forward on while the store is away at the next start, and our previous subnet.
type savedLast struct {
	V       int          `json:"v"`
	SavedAt time.Time    `json:"saved_at"` // when our lease was last known to be held
	Subnet  netip.Prefix `json:"subnet"`
	Subnet6 netip.Prefix `json:"subnet6,omitzero"`
	Port    int          `json:"port"`             // UDP port the underlay was bound to
	Config  string       `json:"config,omitempty"` // as in the store, byte for byte; empty: it is to be asked for
	Leases  []savedLease `json:"leases,omitempty"`

	// The same time by the clock of a run of the host, which nobody sets; empty and 0 where SavedAt is of an earlier run.
	Boot   string        `json:"boot,omitempty"`
	Uptime time.Duration `json:"uptime,omitempty"` // since the host was started, ns

	Store  string           `json:"store,omitempty"`  // whose all this is: storeOf
	Names  []lease.Name     `json:"names,omitempty"`  // of everybody's containers
	Closed []netip.AddrPort `json:"closed,omitempty"` // that no container reaches
}

// savedLease is one lease of the overlay; Attrs is the value in the store.
type savedLease struct {
	Subnet  netip.Prefix    `json:"subnet"`
	Subnet6 netip.Prefix    `json:"subnet6,omitzero"`
	Attrs   json.RawMessage `json:"attrs"`
}
