// This file is the etcd v3 client behind Store: endpoints, TLS in all its variants, short timeouts, and errors that
// say what is wrong in the words of errors.go.

package lease

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// DefaultTimeout bounds one request to the store.
const DefaultTimeout = 5 * time.Second

// ClientConfig says how to reach etcd. TLS is used where an endpoint begins with https:// or any of the files is
// given, and then for all endpoints: with CAFile alone the server is verified against it, without CAFile against the
// system's roots; CertFile and KeyFile, always together, identify this client. The files are read again for every
// connection, so that one which is renewed in its place counts from the next on.
type ClientConfig struct {
	Endpoints                 []string // "http://host:2379", "https://..." or "host:2379"
	CAFile, CertFile, KeyFile string   // PEM
	Username, Password        string
	Timeout                   time.Duration // of one request; 0: DefaultTimeout
}

// Client is a Store on an etcd cluster.
type Client struct {
	etcd    *clientv3.Client
	leases  pb.LeaseClient
	watches pb.WatchClient
	conns   *connections
	members membership
	timeout time.Duration
	name    string
}

// Dial makes a client. Without a user name it does not talk to the store, so it succeeds while the store is away; with
// one it fetches a token first and may fail with ErrUnreachable, ErrTLS or ErrAuth: the caller tries again. Files that
// cannot be read and settings that contradict each other are plain errors. Close the client after its last use.
func Dial(ctx context.Context, c ClientConfig) (*Client, error) {
	if len(c.Endpoints) == 0 {
		return nil, errors.New("no etcd endpoint given")
	}
	endpoints, secure, err := normalize(c)
	if err != nil {
		return nil, err
	}
	name := "etcd " + strings.Join(endpoints, ",")
	var tlsConfig *tls.Config
	if secure {
		if tlsConfig, err = c.TLS(); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if c.Password != "" && c.Username == "" {
		return nil, fmt.Errorf("%s: a password without a user name", name)
	}
	timeout := c.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}

	var user *account
	if c.Username != "" {
		user = newAccount(c.Username, c.Password, timeout)
	}
	options := []grpc.DialOption{
		// gRPC by itself would look for a store that was long away every two minutes only.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           grpcbackoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: timeout,
		}),
		grpc.WithChainUnaryInterceptor(user.unary),
		grpc.WithChainStreamInterceptor(user.stream),
	}
	conns := &connections{open: make(map[net.Conn]bool)}
	transport := insecure.NewCredentials()
	if tlsConfig != nil {
		transport = rereading{credentials.NewTLS(tlsConfig), c}
	}
	options = append(options, grpc.WithTransportCredentials(listed{transport, conns}))

	etcd, err := clientv3.New(clientv3.Config{
		Context:              context.WithoutCancel(ctx), // for its whole life
		Endpoints:            endpoints,
		TLS:                  tlsConfig,
		DialKeepAliveTime:    10 * time.Second, // notice a silent network; etcd allows 5 s and more
		DialKeepAliveTimeout: 5 * time.Second,
		MaxUnaryRetries:      3,
		MaxCallRecvMsgSize:   maxMessage,
		Logger:               zap.NewNop(),
		DialOptions:          options,
	})
	if err != nil {
		return nil, classify(ctx, name, "connecting", err)
	}
	conn := etcd.ActiveConnection()
	client := &Client{
		etcd: etcd, leases: pb.NewLeaseClient(conn), watches: pb.NewWatchClient(conn), conns: conns,
		members: membership{all: endpoints, chosen: make(chan struct{})}, timeout: timeout, name: name,
	}
	if user != nil {
		user.auth = pb.NewAuthClient(conn)
		if _, err := user.current(ctx); err != nil {
			return nil, errors.Join(classify(ctx, name, "connecting", err), client.Close())
		}
	}
	return client, nil
}

// rereading is TLS by files that are read for every connection: certificates live for weeks now, and are renewed in their place.
type rereading struct {
	credentials.TransportCredentials // made of the files as they were at first
	files                            ClientConfig
}

func (r rereading) Clone() credentials.TransportCredentials {
	return rereading{r.TransportCredentials.Clone(), r.files}
}

func (r rereading) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	now, err := r.files.TLS()
	if err != nil {
		return nil, nil, fmt.Errorf("tls: %w", err) // the prefix makes it an ErrTLS
	}
	return alerting{credentials.NewTLS(now)}.ClientHandshake(ctx, authority, raw)
}

// alerting is TLS that tells why the server hung up. In TLS 1.3 a server looks at the client's certificate when the
// client is done with its handshake and may be writing already; the write then fails with "broken pipe", and the
// server's alert is there to be read.
type alerting struct {
	credentials.TransportCredentials
}

func (a alerting) Clone() credentials.TransportCredentials {
	return alerting{a.TransportCredentials.Clone()}
}

func (a alerting) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := a.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return &alertConn{conn}, info, nil
}

type alertConn struct{ net.Conn }

func (c *alertConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		// Whoever reads the alert first, crypto/tls returns it to all.
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, rerr := c.Read(make([]byte, 1)); rerr != nil && strings.Contains(rerr.Error(), "tls: ") {
			err = rerr
		}
	}
	return n, err
}

// normalize gives every endpoint a scheme and says whether TLS is to be used. gRPC speaks one of the two to all
// endpoints, so a mixture is refused.
func normalize(c ClientConfig) (endpoints []string, secure bool, err error) {
	if (c.CertFile == "") != (c.KeyFile == "") {
		return nil, false, errors.New("etcd TLS: a client certificate needs both its certificate file and its key file")
	}
	files := c.CAFile != "" || c.CertFile != ""
	var plain, https int
	for _, e := range c.Endpoints {
		e = strings.TrimSpace(e)
		scheme, rest, ok := strings.Cut(e, "://")
		if !ok {
			rest, scheme = e, "http"
			if files {
				scheme = "https"
			}
		}
		rest = strings.TrimRight(rest, "/")
		switch {
		case rest == "":
			return nil, false, fmt.Errorf("etcd endpoint %q has no host", e)
		case scheme == "http" || scheme == "unix":
			plain++
		case scheme == "https" || scheme == "unixs":
			https++
		default:
			return nil, false, fmt.Errorf("etcd endpoint %q: the scheme must be http or https", e)
		}
		endpoints = append(endpoints, scheme+"://"+rest)
	}
	switch {
	case plain > 0 && https > 0:
		return nil, false, fmt.Errorf("etcd endpoints %s: http and https cannot be mixed", strings.Join(endpoints, ","))
	case plain > 0 && files:
		return nil, false, fmt.Errorf("etcd endpoints %s: TLS files are given, but http endpoints do not use them: write https", strings.Join(endpoints, ","))
	}
	return endpoints, https > 0, nil
}

// TLS reads the files of c. Without a CA file the roots are the system's.
func (c ClientConfig) TLS() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("CA file: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("CA file %s holds no PEM certificate", c.CAFile)
		}
	}
	if c.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("client certificate %s with key %s: %w", c.CertFile, c.KeyFile, err)
		}
		t.Certificates = []tls.Certificate{cert}
	}
	return t, nil
}

// Close ends the connections and every watch.
func (c *Client) Close() error {
	if err := c.etcd.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// MemberURLs are, of each member of the store, the URLs that it tells clients and other members to use: the store may be reached there beside the
// endpoints that we were given. What the member asked knows is enough. A store with users may tell its root alone (ErrAuth).
func (c *Client) MemberURLs(ctx context.Context) ([][]string, error) {
	op, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.etcd.MemberList(op, clientv3.WithSerializable())
	if err == nil {
		err = c.sameStore(ctx, resp.Header, 0)
	}
	if err != nil {
		return nil, c.failed(ctx, "listing its members", err)
	}
	urls := make([][]string, len(resp.Members))
	for i, m := range resp.Members {
		urls[i] = slices.Concat(m.ClientURLs, m.PeerURLs)
	}
	return urls, nil
}

// Endpoints are the URLs that the client was made with.
func (c *Client) Endpoints() []string { return slices.Clone(c.members.all) }

// String names the store: "etcd http://127.0.0.1:2379".
func (c *Client) String() string { return c.name }

// Get implements Store.
func (c *Client) Get(ctx context.Context, key string, prefix bool) ([]Pair, int64, error) {
	read := c.page
	if prefix {
		read = c.list
	}
	pairs, rev, err := read(ctx, key)
	for range maxRaces {
		if !errors.Is(rpctypes.Error(err), rpctypes.ErrCompacted) {
			break
		}
		pairs, rev, err = read(ctx, key) // between two pages
	}
	if err != nil {
		return nil, 0, c.failed(ctx, "reading "+key, err)
	}
	return pairs, rev, nil
}

// page reads key, or what the options say of the keys that begin with it.
func (c *Client) page(ctx context.Context, key string, opts ...clientv3.OpOption) ([]Pair, int64, error) {
	floor := c.members.floor() // which may wait for a look at all endpoints
	op, cancel := c.request(ctx)
	defer cancel()
	resp, err := c.etcd.Get(op, key, opts...)
	if err == nil {
		err = c.sameStore(ctx, resp.Header, floor)
	}
	if err != nil {
		return nil, 0, err
	}
	pairs := make([]Pair, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		pairs[i] = pairOf(kv)
	}
	return pairs, resp.Header.Revision, nil
}

// request bounds a request, which a member that has no leader is to refuse rather than keep.
func (c *Client) request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(clientv3.WithRequireLeader(ctx), c.timeout)
}

// What a listing may take, whatever has been put into the store.
const (
	maxMessage = 64 << 20  // bytes of one answer
	maxListing = 256 << 20 // bytes of values that are kept of all pages; those that follow are taken as empty
	pageKeys   = 1000      // of a page; fewer where the values are so large that an answer would be too long
)

// list reads all keys that begin with key, page by page, as they are at one revision.
func (c *Client) list(ctx context.Context, key string, _ ...clientv3.OpOption) (all []Pair, rev int64, err error) {
	end, from, most, kept := clientv3.GetPrefixRangeEnd(key), key, int64(pageKeys), 0
	for {
		pairs, at, err := c.page(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(most), clientv3.WithRev(rev))
		switch {
		case err != nil && strings.Contains(err.Error(), "larger than max") && most > 1:
			most /= 4
			most = max(most, 1)
			continue
		case err != nil:
			return nil, 0, err
		case rev == 0:
			rev = at
		}
		for i := range pairs {
			if kept += len(pairs[i].Value); kept > maxListing {
				pairs[i].Value = nil
			}
		}
		all = append(all, pairs...)
		if int64(len(pairs)) < most {
			return all, rev, nil
		}
		from = pairs[len(pairs)-1].Key + "\x00"
	}
}

// pairOf keeps no more of a value than tells that it is too long.
func pairOf(kv *mvccpb.KeyValue) Pair {
	value := kv.Value
	if len(value) > MaxValue {
		value = bytes.Clone(value[:MaxValue+1])
	}
	return Pair{string(kv.Key), value, kv.ModRevision, LeaseID(kv.Lease)}
}

// Commit implements Store.
func (c *Client) Commit(ctx context.Context, t Txn) (bool, int64, error) {
	conds := make([]clientv3.Cmp, len(t.If))
	for i, g := range t.If {
		if g.AtMost {
			conds[i] = clientv3.Compare(clientv3.ModRevision(g.Key), "<", g.ModRevision+1)
		} else {
			conds[i] = clientv3.Compare(clientv3.ModRevision(g.Key), "=", g.ModRevision)
		}
		if g.Prefix {
			conds[i] = conds[i].WithPrefix()
		}
	}
	write := clientv3.OpDelete(t.Key)
	if !t.Delete {
		write = clientv3.OpPut(t.Key, string(t.Value), clientv3.WithLease(clientv3.LeaseID(t.Lease)))
	}
	floor := c.members.floor() // which may wait for a look at all endpoints
	op, cancel := c.request(ctx)
	defer cancel()
	resp, err := c.etcd.Txn(op).If(conds...).Then(write).Commit()
	if err == nil {
		err = c.sameStore(ctx, resp.Header, floor)
	}
	if err != nil {
		return false, 0, c.failed(ctx, "writing "+t.Key, err)
	}
	return resp.Succeeded, resp.Header.Revision, nil
}

// Grant implements Store.
func (c *Client) Grant(ctx context.Context, ttl time.Duration) (LeaseID, error) {
	op, cancel := c.request(ctx)
	defer cancel()
	resp, err := c.etcd.Grant(op, max(1, int64(ttl/time.Second)))
	if err == nil {
		err = c.sameStore(ctx, resp.ResponseHeader, 0)
	}
	if err != nil {
		return 0, c.failed(ctx, "asking for an etcd lease", err)
	}
	return LeaseID(resp.ID), nil
}

// KeepAlive implements Store. clientv3's KeepAliveOnce spins while the store is away, and its KeepAlive decides itself
// when to give up, so this is the request itself, once.
func (c *Client) KeepAlive(ctx context.Context, id LeaseID) (time.Duration, error) {
	op, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	ttl, err := c.keepAlive(op, id)
	if wantsToken(err) { // the second stream carries another one
		ttl, err = c.keepAlive(op, id)
	}
	if err != nil {
		return 0, c.failed(ctx, fmt.Sprintf("keeping etcd lease %x alive", int64(id)), err)
	}
	return ttl, nil
}

func (c *Client) keepAlive(ctx context.Context, id LeaseID) (time.Duration, error) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	stream, err := c.leases.LeaseKeepAlive(ctx)
	if err != nil {
		return 0, err
	}
	// A failed Send reports io.EOF; the reason is in what Recv returns.
	_ = stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)})
	resp, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	if err := c.sameStore(ctx, resp.Header, 0); err != nil {
		return 0, err // it knows nothing of our leases
	}
	if resp.TTL <= 0 {
		return 0, rpctypes.ErrGRPCLeaseNotFound
	}
	return time.Duration(resp.TTL) * time.Second, nil
}

// Revoke implements Store.
func (c *Client) Revoke(ctx context.Context, id LeaseID) error {
	op, cancel := c.request(ctx)
	defer cancel()
	_, err := c.etcd.Revoke(op, clientv3.LeaseID(id))
	if err = c.failed(ctx, fmt.Sprintf("revoking etcd lease %x", int64(id)), err); errors.Is(err, ErrLeaseExpired) {
		return nil
	}
	return err
}

// Watch implements Store. clientv3's watch resumes by itself and tells nobody, so this is the request itself: a lost
// connection ends the watch, its owner notices the outage and lists again, which also survives a store that came back
// with less data.
func (c *Client) Watch(ctx context.Context, key string, prefix bool, rev int64) <-chan Events {
	out := make(chan Events)
	req := &pb.WatchCreateRequest{Key: []byte(key), StartRevision: rev, Fragment: true}
	if prefix {
		req.RangeEnd = []byte(clientv3.GetPrefixRangeEnd(key))
	}
	go func() {
		defer close(out)
		send := func(e Events) bool {
			select {
			case out <- e:
				return true
			case <-ctx.Done():
				return false
			}
		}
		watching, cancel := context.WithCancel(ctx)
		defer cancel()
		go c.lookAround(watching, cancel)
		err := c.watch(watching, req, send)
		if watching.Err() != nil {
			err = errMoved
		}
		if ctx.Err() == nil {
			send(Events{Err: c.failed(ctx, "watching "+key, err)})
		}
	}()
	return out
}

// watch runs until the stream fails, which it does when ctx ends at the latest.
func (c *Client) watch(ctx context.Context, req *pb.WatchCreateRequest, send func(Events) bool) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	stream, err := c.watches.Watch(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return err
	}
	// A failed Send reports io.EOF; the reason is in what Recv returns.
	_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: req}})
	var e Events // of the fragments so far: a revision is told whole
	for {
		resp, err := stream.Recv()
		switch {
		case err != nil:
			return err
		case resp.CompactRevision != 0:
			return rpctypes.ErrGRPCCompacted
		case resp.Canceled && strings.Contains(resp.CancelReason, rpctypes.ErrPermissionDenied.Error()):
			return rpctypes.ErrGRPCPermissionDenied
		case resp.Canceled:
			return status.Error(codes.Unavailable, resp.CancelReason)
		case resp.Created:
			if err := c.stands(ctx, resp.Header, req); err != nil {
				return err
			}
			continue
		case len(resp.Events) == 0:
			continue
		}
		e.Revision = resp.Header.Revision
		for _, ev := range resp.Events {
			e.Changes = append(e.Changes, Change{pairOf(ev.Kv), ev.Type == mvccpb.Event_DELETE})
		}
		if resp.Fragment {
			continue
		}
		if !send(e) {
			return ctx.Err()
		}
		e = Events{}
	}
}

// stands is an error if a watch that was created would wait for a revision of another time: a store that was restored from a backup, or that
// began anew, says nothing and reports what happens when it has come there. A member of a cluster may lag behind for a moment.
func (c *Client) stands(ctx context.Context, h *pb.ResponseHeader, req *pb.WatchCreateRequest) error {
	if err := c.sameStore(ctx, h, 0); err != nil {
		return err
	}
	if h.GetRevision() >= req.StartRevision-1 {
		return nil
	}
	op, cancel := c.request(ctx)
	defer cancel()
	now, err := c.etcd.Get(op, string(req.Key), clientv3.WithCountOnly())
	if err == nil && now.Header.Revision < req.StartRevision-1 {
		err = fmt.Errorf("at revision %d, which is before %d: %w", now.Header.Revision, req.StartRevision, ErrRewound)
	}
	return err
}

// storeError is a failure of the store: which store, during what, of which kind.
type storeError struct {
	store, doing string
	kind, cause  error
	detail       string
}

func (e *storeError) Error() string {
	s := e.store + ": " + e.doing + ": " + e.kind.Error()
	if e.detail != "" {
		s += ": " + e.detail
	}
	return s
}

func (e *storeError) Unwrap() []error { return []error{e.kind, e.cause} }

// classify puts what clientv3 and gRPC report into our words. ctx is the caller's: if it was cancelled, that is the
// error; if its deadline passed, the store did not answer in time.
func classify(ctx context.Context, store, doing string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("%s: %s: %w", store, doing, ctx.Err())
	}
	code := status.Code(err)
	if e := (rpctypes.EtcdError{}); errors.As(err, &e) {
		code = e.Code()
	}
	text := err.Error()
	e := &storeError{store, doing, ErrUnreachable, err, tidy(text)}
	is := func(targets ...error) bool {
		for _, t := range targets {
			if errors.Is(rpctypes.Error(err), t) {
				return true
			}
		}
		return false
	}
	switch {
	case is(rpctypes.ErrLeaseNotFound):
		e.kind, e.detail = ErrLeaseExpired, ""
	case is(rpctypes.ErrCompacted):
		e.kind, e.detail = ErrCompacted, ""
	case errors.Is(err, ErrRewound):
		e.kind, e.detail = ErrRewound, ""
	case is(rpctypes.ErrAuthFailed, rpctypes.ErrPermissionDenied, rpctypes.ErrInvalidAuthToken, rpctypes.ErrUserEmpty,
		rpctypes.ErrUserNotFound, rpctypes.ErrRootUserNotExist, rpctypes.ErrAuthOldRevision),
		code == codes.Unauthenticated, code == codes.PermissionDenied:
		e.kind = ErrAuth
	case strings.Contains(text, "tls: "), strings.Contains(text, "x509: "):
		e.kind = ErrTLS
	case silence(text):
		e.detail = "no answer in time"
	case strings.Contains(text, "authentication handshake failed"):
		// No word from crypto/tls, so the connection ended: the server stops, or does not speak TLS.
		e.detail += " during the TLS handshake (does it speak http rather than https?)"
	case strings.Contains(text, "error reading server preface"):
		// The server hung up, or spoke something else than HTTP/2.
		e.detail += " (does it want https? then write https and give a CA file if need be)"
	case errors.Is(err, context.DeadlineExceeded), code == codes.DeadlineExceeded:
		e.detail = "no answer in time"
		if _, why, ok := strings.Cut(text, "latest balancer error: "); ok {
			e.detail += ": " + tidy(why)
		}
	}
	return e
}

// silence is whether gRPC gave a connection up because nothing came: a read that failed because our own side closed it, or ran out
// of time. What is in front of the phrases is about the request, which always runs out of time.
func silence(text string) bool {
	if strings.Contains(text, "use of closed network connection") {
		return true
	}
	for _, phrase := range []string{"error reading server preface: ", "authentication handshake failed: "} {
		if _, why, ok := strings.Cut(text, phrase); ok {
			return strings.Contains(why, "context deadline exceeded") || strings.Contains(why, "i/o timeout")
		}
	}
	return false
}

// tidy leaves of gRPC's "rpc error: code = Unavailable desc = connection error: desc = \"transport: Error while
// dialing: dial tcp 127.0.0.1:1: connect: connection refused\"" only what a person wants to read.
func tidy(s string) string {
	if i := strings.LastIndex(s, "desc = "); i >= 0 {
		s = s[i+len("desc = "):]
	}
	s = strings.ReplaceAll(strings.Trim(s, `"\`), `\"`, `"`)
	for _, noise := range []string{"transport: ", "Error while dialing: ", "authentication handshake failed: "} {
		s = strings.TrimPrefix(s, noise)
	}
	return s
}
