// This file is the cache of what servers answered: for as long as its records may be kept, counted down; bounded in number and bytes; emptied
// when other servers are asked.

package dns

import (
	"bytes"
	"container/list"
	"encoding/binary"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Bounds of the cache and of what is kept in it.
const (
	maxCached      = 4096
	maxCachedBytes = 4 << 20
	cachedOverhead = 256       // bytes an answer takes beside its own
	maxTTL         = 24 * 3600 // seconds
	maxNegativeTTL = 3600      // seconds; RFC 2308 section 5 speaks of hours
)

// cache is safe for concurrent use.
type cache struct {
	mu         sync.Mutex
	generation uint64 // of the servers whose answers these are
	answers    map[string]*list.Element
	recent     list.List // of *cached, the last used first
	bytes      int
}

type cached struct {
	key     string
	wire    []byte
	ttls    []int // where in wire
	stored  time.Time
	expires time.Time
}

// follow empties the cache if it is of other servers than those of generation.
func (c *cache) follow(generation uint64) {
	if c.generation != generation || c.answers == nil {
		c.generation, c.answers, c.bytes = generation, make(map[string]*list.Element), 0
		c.recent.Init()
	}
}

// get is the answer to q, whose key is given, as it is now; nil: there is none.
func (c *cache) get(generation uint64, key string, q *query, now time.Time) []byte {
	c.mu.Lock()
	c.follow(generation)
	e := c.answers[key]
	if e == nil {
		c.mu.Unlock()
		return nil
	}
	a := e.Value.(*cached)
	if !now.Before(a.expires) {
		c.remove(e)
		c.mu.Unlock()
		return nil
	}
	c.recent.MoveToFront(e)
	c.mu.Unlock()
	b := q.readdressed(a.wire) // wire and ttls are never changed
	age := uint32(now.Sub(a.stored) / time.Second)
	for _, at := range a.ttls {
		left := binary.BigEndian.Uint32(b[at:])
		binary.BigEndian.PutUint32(b[at:], left-min(left, age))
	}
	return b
}

// put keeps a server's answer to q, if it may be kept.
func (c *cache) put(generation uint64, key string, q *query, answer []byte, now time.Time) {
	ttls, seconds := lifetime(answer, q)
	if seconds == 0 {
		return
	}
	a := &cached{key, bytes.Clone(answer), ttls, now, now.Add(time.Duration(seconds) * time.Second)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.follow(generation); c.answers[key] != nil {
		c.remove(c.answers[key])
	}
	c.answers[key] = c.recent.PushFront(a)
	c.bytes += a.size()
	for len(c.answers) > maxCached || c.bytes > maxCachedBytes {
		c.remove(c.recent.Back())
	}
}

func (c *cache) remove(e *list.Element) {
	a := c.recent.Remove(e).(*cached)
	delete(c.answers, a.key)
	c.bytes -= a.size()
}

func (a *cached) size() int { return cachedOverhead + len(a.wire) + len(a.key) + 8*len(a.ttls) }

// lifetime says where the TTLs of an answer to q are, and for how many seconds it may be kept: 0 is not at all, as for what is truncated, for
// failures, and for denials without the SOA record that says how long they hold (RFC 2308 section 5).
func lifetime(b []byte, q *query) (ttls []int, seconds uint32) {
	rc := rcode(b)
	if truncated(b) || rc != dns.RcodeSuccess && rc != dns.RcodeNameError || binary.BigEndian.Uint16(b[4:]) != 1 {
		return nil, 0
	}
	counts := [3]int{}
	for i := range counts {
		counts[i] = int(binary.BigEndian.Uint16(b[6+2*i:]))
	}
	const answers, authorities = 0, 1
	seconds = maxTTL
	found, denied := false, false
	at := q.end
	for section, n := range counts {
		for range n {
			if at = skipName(b, at); at < 0 || at+10 > len(b) {
				return nil, 0
			}
			kind := binary.BigEndian.Uint16(b[at:])
			ttl := binary.BigEndian.Uint32(b[at+4:])
			end := at + 10 + int(binary.BigEndian.Uint16(b[at+8:]))
			if end > len(b) {
				return nil, 0
			}
			if kind == dns.TypeOPT {
				if b[at+4] != 0 { // the upper bits of the response code
					return nil, 0
				}
				at = end
				continue
			}
			if ttl > 1<<31-1 { // RFC 2181 section 8
				ttl = 0
			}
			ttls = append(ttls, at+4)
			seconds = min(seconds, ttl)
			switch {
			case section == answers && (kind == q.question.Qtype || q.question.Qtype == dns.TypeANY):
				found = true
			case section == authorities && kind == dns.TypeSOA && end-at >= 10+4:
				denied = true
				if minimum := binary.BigEndian.Uint32(b[end-4:]); rc == dns.RcodeNameError || !found {
					seconds = min(seconds, minimum, maxNegativeTTL)
				}
			}
			at = end
		}
	}
	if (rc == dns.RcodeNameError || !found) && !denied {
		return nil, 0
	}
	return ttls, seconds
}

// skipName is where the name at b[at:] ends, or -1.
func skipName(b []byte, at int) int {
	for at < len(b) {
		switch n := int(b[at]); {
		case n == 0:
			return at + 1
		case n >= 0xc0:
			return at + 2
		case n > 63:
			return -1
		default:
			at += 1 + n
		}
	}
	return -1
}
