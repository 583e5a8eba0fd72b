// This file follows the host's resolv.conf.

package dns

import (
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

const (
	defaultResolvConf = "/etc/resolv.conf"
	// checkEvery is how often the file is looked at, at most.
	checkEvery = time.Second
	// maxServers is MAXNS of resolv.conf(5).
	maxServers = 3
	// silentFor is how long a server that did not answer is asked after the others.
	silentFor = 10 * time.Second
)

// server is one resolver of the host.
type server struct {
	addr        netip.AddrPort
	silentUntil atomic.Int64 // ticks
}

// conf is what resolv.conf says. It is never changed once made.
type conf struct {
	servers  []*server
	timeout  time.Duration // for one server; zero is none given
	attempts int

	generation uint64 // grows when the servers are others
}

// fileID tells versions of a file apart. The zero value is a file that is not there.
type fileID struct {
	device, inode uint64
	size          int64
	modified      time.Time
}

// follower keeps the newest conf of a file.
type follower struct {
	path string
	port uint16
	log  *slog.Logger

	mu      sync.Mutex
	checked time.Time
	seen    fileID
	said    string // what was wrong with the file, for the log to say it once
	current *conf
}

// get is the newest conf; it looks at the file if that has not been done within checkEvery.
func (f *follower) get() *conf {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if f.current != nil && now.Sub(f.checked) < checkEvery {
		return f.current
	}
	f.checked = now
	id, statErr := identify(f.path)
	if f.current != nil && id == f.seen {
		return f.current
	}
	f.seen = id
	c, err := f.load()
	if statErr != nil {
		err = statErr
	}
	switch {
	case err == nil:
		f.said = ""
	case err.Error() != f.said:
		f.said = err.Error()
		f.log.Warn("the host's resolvers are unknown: trying its loopback, as its own programs do", "file", f.path, "err", err)
	}
	if f.current != nil {
		c.generation = f.current.generation
		if !slices.EqualFunc(f.current.servers, c.servers, func(a, b *server) bool { return a.addr == b.addr }) {
			c.generation++
		}
	}
	f.current = c
	return c
}

func identify(path string) (fileID, error) {
	st, err := os.Stat(path)
	if err != nil {
		return fileID{}, err
	}
	id := fileID{size: st.Size(), modified: st.ModTime()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		id.device, id.inode = sys.Dev, sys.Ino
	}
	return id, nil
}

func (f *follower) load() (*conf, error) {
	file, err := os.Open(f.path)
	if err != nil {
		return fallback(f.port), err
	}
	defer file.Close()
	c, err := parse(file, f.port)
	if err != nil {
		return fallback(f.port), err
	}
	return c, nil
}

// fallback is what the C library does without a name server: the loopback (resolv.conf(5)).
func fallback(port uint16) *conf {
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	return &conf{servers: []*server{{addr: netip.AddrPortFrom(loopback, port)}}, attempts: 1}
}

var errNoServer = errors.New("it names no server: a line such as nameserver 192.0.2.53 is needed for containers to resolve names of the outside")

// parse reads a resolv.conf. Lines that it does not understand are passed over.
func parse(r io.Reader, port uint16) (*conf, error) {
	const maxSize = 64 << 10 // bytes
	cc, err := dns.ClientConfigFromReader(io.LimitReader(r, maxSize))
	if err != nil {
		return nil, err
	}
	c := &conf{attempts: min(max(cc.Attempts, 1), 5)}
	if cc.Timeout > 0 {
		c.timeout = time.Duration(cc.Timeout) * time.Second
	}
	for _, s := range cc.Servers {
		if a, err := netip.ParseAddr(s); err == nil && len(c.servers) < maxServers {
			c.servers = append(c.servers, &server{addr: netip.AddrPortFrom(a, port)})
		}
	}
	if len(c.servers) == 0 {
		return nil, errNoServer
	}
	return c, nil
}

var started = time.Now()

// ticks is the time since the program began, in ns: setting the host's clock silences no server, nor keeps one silent.
func ticks() int64 { return int64(time.Since(started)) }

// order is the servers as they are to be asked now: the silent ones last.
func (c *conf) order() []*server {
	now := ticks()
	out := make([]*server, 0, len(c.servers))
	for _, s := range c.servers {
		if s.silentUntil.Load() <= now {
			out = append(out, s)
		}
	}
	for _, s := range c.servers {
		if s.silentUntil.Load() > now {
			out = append(out, s)
		}
	}
	return out
}
