// This file finds the largest packet that the underlay carries to each peer: path MTU discovery by datagrams of our own (RFC 8899),
// because ICMP errors of the underlay may be filtered, and may be forged.
//
// A peer is looked after for as long as containers here send to it, and costs nothing otherwise:
//
//	a packet goes to a peer that nobody looked at for a second
//	  -> never searched, or ten minutes ago: search
//	  -> else the kernel's route says less than before, or nothing was confirmed for 15 s: probe the size in use;
//	     twice unanswered: search
//
// A search sends a few sizes at once, down to one that every path carries. The largest that is answered is the path's; a size
// counts as too large when it was lost three times while a smaller one was answered. When none is, the peer is away and nothing
// changes, but that the kernel's word is then all there is: a smaller MTU of its route is taken. What the kernel says otherwise only
// chooses which sizes are tried.

package node

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rootless-ovl/rootless-ovl/forwarder"
)

const (
	lookEvery    = time.Second      // at most, at a peer that is sent to
	confirmEvery = 15 * time.Second // probe the size in use: finds black holes
	raiseEvery   = 10 * time.Minute // try the largest again (RFC 8899 5.1.1, PMTU_RAISE_TIMER)
	awayMost     = time.Minute      // between searches for a peer that answers nothing

	// A round ends roundSpare after two round trips, or when all its probes are answered, or after roundMost.
	roundSpare, roundMost = 50 * time.Millisecond, time.Second
	maxTries              = 3 // RFC 8899 MAX_PROBES

	// maxSearches bounds the probing that is going on at once.
	maxSearches = 64
	// granularity is how exact a search is, in bytes.
	granularity = 8
	// refineBytes and refineProbes bound what a round of the last part of a search sends.
	refineBytes, refineProbes = 64 << 10, 8

	// baseMTU is the underlay MTU that practically every path carries: that of IPv6.
	baseMTU = 1280
)

// commonMTUs of the underlay are tried first: tunnels, PPPoE, clouds, jumbo frames.
var commonMTUs = []int{1400, 1420, 1436, 1440, 1450, 1454, 1460, 1472, 1476, 1480, 1492, 1500, 2304, 4096, 4352, 8000, 8500, 8900, 8950, 9000, 16384, 32768}

// probePath is what the prober does with a forwarder.Router.
type probePath interface {
	SendProbe(forwarder.Probe) error
	PathEvents() <-chan forwarder.PathEvent
	WatchPeer(forwarder.PeerConfig)
	KernelMTU(netip.AddrPort) int
	Overhead(peer netip.Addr) int
}

// pathTarget is a peer as the prober must know it.
type pathTarget struct {
	config  forwarder.PeerConfig // its MTU is that of the two nodes, the most that is tried
	source  netip.Addr           // our own overlay address
	answers [2]netip.Addr        // its own overlay addresses, where it answers probes; the second may be missing
	least   int                  // the smallest MTU in bytes that the family allows
}

// pathCounts are shown by status.
type pathCounts struct {
	ProbesSent     uint64 `json:"probes_sent"`
	ProbesAnswered uint64 `json:"probes_answered"`
	Searches       uint64 `json:"searches"`
	SearchesVain   uint64 `json:"searches_unanswered"`
	Narrow         uint64 `json:"narrow_peers"` // whose path carries less than the two nodes
	Silent         uint64 `json:"silent_peers"` // which answer nothing that they are asked
}

// prober holds the path MTU of every peer.
type prober struct {
	// constant after newProber
	log   *slog.Logger
	found func()        // the MTU of a path has changed; called without a lock held
	slots chan struct{} // one for each search that is going on

	sent, answered, searches, vain atomic.Uint64

	// guarded by mu
	mu    sync.Mutex
	via   probePath                    // nil before run
	paths map[netip.AddrPort]*peerPath // by underlay address
	asked map[uint64]*peerPath         // by token, the probes that may still be answered
}

// peerPath is the way to one peer.
type peerPath struct {
	// constant
	target  pathTarget
	answers chan uint64   // tokens
	gone    chan struct{} // closed when the peer is followed no more

	// guarded by prober.mu
	mtu    int       // bytes
	silent time.Time // since when it answers nothing; zero: it does, or has not been asked
	busy   bool      // a goroutine looks at it, and owns what follows

	searched  time.Time // last time that a search came to a result; zero: never, or the peer was away since
	confirmed time.Time // last time that the MTU was answered
	refuted   int       // what the kernel said when a probe proved it wrong
	pause     time.Duration
	answersAt netip.Addr // of target.answers, the one that does
}

func newProber(log *slog.Logger, found func()) *prober {
	return &prober{
		log: log, found: found, slots: make(chan struct{}, maxSearches),
		paths: make(map[netip.AddrPort]*peerPath), asked: make(map[uint64]*peerPath),
	}
}

// follow replaces the set of peers. What is known of a path stays while the peer does.
func (p *prober) follow(targets []pathTarget) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.paths
	p.paths = make(map[netip.AddrPort]*peerPath, len(targets))
	for _, t := range targets {
		addr := t.config.Addr
		if p.paths[addr] != nil {
			continue // two subnets of one node have one path
		}
		if same := old[addr]; same != nil && same.target == t {
			p.paths[addr] = same
			delete(old, addr)
			continue
		}
		p.paths[addr] = &peerPath{target: t, mtu: t.config.MTU, answers: make(chan uint64, 64), gone: make(chan struct{})}
		if p.via != nil {
			p.via.WatchPeer(t.config) // where the router knows it already, and only its MTU is new
		}
	}
	for _, path := range old {
		close(path.gone)
	}
}

// restart has every path searched anew when it is next used: this host is somewhere else. Until then what was known of it holds.
func (p *prober) restart() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for addr, path := range p.paths {
		p.paths[addr] = &peerPath{target: path.target, mtu: path.mtu, answers: make(chan uint64, 64), gone: make(chan struct{})}
		close(path.gone)
		if p.via != nil {
			p.via.WatchPeer(path.target.config)
		}
	}
}

// mtu is the path MTU towards a peer in bytes, most if it is followed no more.
func (p *prober) mtu(peer netip.AddrPort, most int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if path := p.paths[peer]; path != nil {
		return min(path.mtu, most)
	}
	return most
}

// silentSince is since when a peer has answered nothing; zero: it does, or has not been asked.
func (p *prober) silentSince(peer netip.AddrPort) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if path := p.paths[peer]; path != nil {
		return path.silent
	}
	return time.Time{}
}

func (p *prober) counts() pathCounts {
	c := pathCounts{ProbesSent: p.sent.Load(), ProbesAnswered: p.answered.Load(), Searches: p.searches.Load(), SearchesVain: p.vain.Load()}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, path := range p.paths {
		if path.mtu < path.target.config.MTU {
			c.Narrow++
		}
		if !path.silent.IsZero() {
			c.Silent++
		}
	}
	return c
}

// run looks after the paths until ctx ends.
func (p *prober) run(ctx context.Context, via probePath) error {
	p.mu.Lock()
	p.via = via
	p.mu.Unlock()
	var looks sync.WaitGroup
	defer looks.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-via.PathEvents():
			if e.Answered != 0 {
				p.deliver(e.Answered)
				continue
			}
			if path := p.start(e.Peer); path != nil {
				looks.Go(func() {
					s := search{prober: p, path: path, via: via, sizes: make(map[uint64]probed)}
					s.look(ctx)
				})
			}
		}
	}
}

// deliver hands an answer to the search that asked.
func (p *prober) deliver(token uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	path := p.asked[token]
	if path == nil {
		return // too late, or made up
	}
	delete(p.asked, token)
	p.answered.Add(1)
	if !path.silent.IsZero() {
		p.log.Info("peer answers again", "peer", path.target.config.Addr, "silent", time.Since(path.silent).Round(time.Second))
		path.silent = time.Time{}
	}
	select {
	case path.answers <- token:
	default:
	}
}

// start takes a path for one goroutine; nil when it is taken already, or followed no more.
func (p *prober) start(peer netip.AddrPort) *peerPath {
	p.mu.Lock()
	defer p.mu.Unlock()
	path := p.paths[peer]
	if path == nil || path.busy {
		return nil
	}
	path.busy = true
	return path
}

// search is one look at a path.
type search struct {
	*prober
	path *peerPath
	via  probePath

	sizes   map[uint64]probed // by token
	tooLong int               // the smallest size that this host itself could not send; 0: none
}

// probed is what a probe tried.
type probed struct {
	size int
	dst  netip.Addr
}

// look does what is due for a peer that is being sent to, and asks to be told of the next packet later.
func (s *search) look(ctx context.Context) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return
	case <-s.path.gone:
		return
	}
	p, now := s.path, time.Now()
	hint := s.hint()
	news := hint > 0 && hint < s.mtuNow() && hint != p.refuted
	switch {
	case p.searched.IsZero(), now.Sub(p.searched) >= raiseEvery:
		s.search(ctx, hint)
	case news, now.Sub(p.confirmed) >= confirmEvery:
		if s.confirms(ctx) {
			p.confirmed = time.Now()
			if news {
				p.refuted = hint
			}
		} else {
			s.search(ctx, hint)
		}
	}
	s.finish()
}

// confirms tells whether the size in use is answered, at the second try if need be.
func (s *search) confirms(ctx context.Context) bool {
	mtu := s.mtuNow()
	sizes := s.sizesOf(mtu, mtu)
	for range 2 {
		if s.round(ctx, sizes) == mtu {
			return true
		}
	}
	return false
}

// finish lets go of the path.
func (s *search) finish() {
	s.mu.Lock()
	for token := range s.sizes {
		delete(s.asked, token)
	}
	for len(s.path.answers) > 0 {
		<-s.path.answers
	}
	s.path.busy = false
	pause := s.path.pause
	s.mu.Unlock()
	time.AfterFunc(max(pause, lookEvery), func() { s.via.WatchPeer(s.path.target.config) })
}

func (s *search) mtuNow() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.path.mtu
}

// hint is the path MTU by the kernel's word, 0 where it says nothing; within what may be.
func (s *search) hint() int {
	mtu := s.via.KernelMTU(s.path.target.config.Addr)
	if mtu == 0 {
		return 0
	}
	return min(max(mtu, s.path.target.least), s.path.target.config.MTU)
}

// overhead is the bytes of an underlay packet to the peer that are not overlay.
func (s *search) overhead() int { return s.via.Overhead(s.path.target.config.Addr.Addr()) }

// search finds the path MTU anew.
func (s *search) search(ctx context.Context, hint int) {
	p, most := s.path, s.path.target.config.MTU
	s.searches.Add(1)
	first := s.sizesOf(most, baseMTU-s.overhead(), hint, s.mtuNow(), most)
	best := 0
	for silent := 0; best == 0 && silent < maxTries; silent++ {
		best = s.round(ctx, first)
	}
	high := most
	if best > 0 && best < most {
		// Once may have been chance; and by the second time the common sizes can be tried as well, and what routers said of the
		// first probes.
		hint = s.hint()
		sizes := append(slices.Clone(first), hint)
		for _, mtu := range commonMTUs {
			sizes = append(sizes, mtu-s.overhead())
		}
		best, high = s.try(ctx, best, s.sizesOf(most, sizes...))
	}
	if s.over(ctx) {
		return
	}
	if best == 0 {
		s.away(hint)
		return
	}
	s.set(best, "")
	for best > 0 && high-best > granularity && best != hint {
		parts := min(max(refineBytes/high, 1), refineProbes, high-best-1) + 1
		var between []int
		for i := 1; i < parts; i++ {
			between = append(between, best+(high-best)*i/parts)
		}
		was, above := best, high
		if best, high = s.try(ctx, was, s.sizesOf(above-1, between...)); best > 0 {
			if high == 0 {
				high = above
			}
			s.set(best, "")
		}
	}
	if s.over(ctx) {
		return
	}
	if best == 0 {
		s.away(0) // it answered a moment ago
		return
	}
	p.searched, p.pause = time.Now(), 0
	p.confirmed = p.searched
	p.refuted = 0
	if hint < s.mtuNow() {
		p.refuted = hint
	}
}

// over tells that the answers, or their absence, mean nothing any more.
func (s *search) over(ctx context.Context) bool {
	select {
	case <-ctx.Done():
	case <-s.path.gone:
	default:
		return false
	}
	return true
}

// away is the end of a search that nothing answered.
func (s *search) away(hint int) {
	s.vain.Add(1)
	p := s.path
	p.searched, p.answersAt = time.Time{}, netip.Addr{}
	p.pause = min(max(2*p.pause, lookEvery), awayMost)
	s.mu.Lock()
	if p.silent.IsZero() {
		p.silent = time.Now()
		s.log.Warn("peer answers nothing that it is asked; containers here send to it", "peer", p.target.config.Addr)
	}
	s.mu.Unlock()
	if hint > 0 && hint < s.mtuNow() {
		s.set(hint, "the kernel's word: the peer answers no probe")
	}
}

// sizesOf are the distinct sizes, in order, that are neither too small for the family nor above most, and the smallest of them.
func (s *search) sizesOf(most int, sizes ...int) []int {
	least := min(s.path.target.least, most)
	sizes = append([]int{least}, sizes...)
	slices.Sort(sizes)
	return slices.DeleteFunc(slices.Compact(sizes), func(n int) bool { return n > most || n < least })
}

// try probes sizes, of which best has been answered before, until each is answered or has been lost maxTries times while a smaller one was
// not. It returns the largest that was answered and the smallest above it that was not, 0 for none. best is 0 when the peer has stopped answering.
func (s *search) try(ctx context.Context, best int, sizes []int) (largest, lost int) {
	for tries, silent := 0, 0; tries < maxTries; {
		above := slices.DeleteFunc(slices.Clone(sizes), func(n int) bool { return n <= best })
		if s.tooLong > 0 {
			above = slices.DeleteFunc(above, func(n int) bool { return n >= s.tooLong })
		}
		if len(above) == 0 {
			break
		}
		got := s.round(ctx, append([]int{best}, above...))
		if got > 0 {
			tries++
			best = max(best, got)
		} else if silent++; silent == maxTries {
			return 0, 0
		}
	}
	for _, n := range sizes {
		if n > best {
			return best, n
		}
	}
	return best, 0
}

// round sends a probe of each size, and returns the largest that was answered by the end of the round, 0 for none.
func (s *search) round(ctx context.Context, sizes []int) (largest int) {
	if s.over(ctx) {
		return 0
	}
	pending := make(map[uint64]bool) // of this round
	start := time.Now()
	for _, size := range sizes {
		if s.tooLong > 0 && size >= s.tooLong {
			continue
		}
		for _, dst := range s.path.target.answers {
			if !dst.IsValid() || s.path.answersAt.IsValid() && dst != s.path.answersAt {
				continue
			}
			token, err := s.send(dst, size)
			if errors.Is(err, forwarder.ErrProbeTooLong) {
				s.tooLong = size
				break
			}
			if err == nil {
				pending[token] = true
			}
		}
	}
	if len(pending) == 0 {
		return 0
	}
	end := time.NewTimer(roundMost)
	defer end.Stop()
	heard := false
	for len(pending) > 0 {
		select {
		case token := <-s.path.answers:
			a, ok := s.sizes[token]
			if !ok {
				continue
			}
			largest = max(largest, a.size)
			if !s.path.answersAt.IsValid() {
				s.path.answersAt = a.dst
				maps.DeleteFunc(pending, func(t uint64, _ bool) bool { return s.sizes[t].dst != a.dst })
			}
			if pending[token] && !heard {
				heard = true
				trip := time.Since(start)
				end.Reset(min(2*trip+roundSpare, roundMost) - trip)
			}
			delete(pending, token)
		case <-end.C:
			return largest
		case <-s.path.gone:
			return 0
		case <-ctx.Done():
			return 0
		}
	}
	return largest
}

func (s *search) send(dst netip.Addr, size int) (uint64, error) {
	token := rand.Uint64()
	s.mu.Lock()
	s.asked[token] = s.path
	s.mu.Unlock()
	s.sizes[token] = probed{size, dst}
	t := &s.path.target
	err := s.via.SendProbe(forwarder.Probe{Peer: t.config.Addr, VTEP: t.config.VTEP, Src: t.source, Dst: dst, Token: token, Size: size})
	s.sent.Add(1)
	return token, err
}

// set takes mtu as the path's.
func (s *search) set(mtu int, why string) {
	s.mu.Lock()
	old := s.path.mtu
	s.path.mtu = mtu
	s.mu.Unlock()
	if mtu == old {
		return
	}
	args := []any{"peer", s.path.target.config.Addr, "mtu", mtu, "before", old, "of_the_nodes", s.path.target.config.MTU}
	if why != "" {
		args = append(args, "why", why)
	}
	s.log.Info("path MTU", args...)
	s.found()
}
