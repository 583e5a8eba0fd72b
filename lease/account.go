// This file is how the client proves who it is to an etcd that asks for a user: the token that goes with every request,
// and when it takes another one.
//
// clientv3 would do it, but sends the token with the request for another one too. An etcd 3.4 that has forgotten the
// token (--auth-token-ttl, by default 5 idle minutes; a crash that lost the last writes) refuses that one as well, and
// clientv3 asks again from within the refused request, without a pause and without an end: a node would never come
// back. See etcd's pull requests 12165 and 12549.

package lease

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// account is a user of etcd and its token. A nil account is nobody: its requests carry none. It is safe for concurrent
// use once auth is set.
type account struct {
	name, password string
	timeout        time.Duration // of asking for a token
	auth           pb.AuthClient // constant after Dial

	asking chan struct{} // holds one while somebody asks for a token
	token  atomic.Pointer[token]
}

// token is compared by its address: two answers of etcd are two tokens.
type token struct{ text string } // "" from an etcd that asks for no user

func newAccount(name, password string, timeout time.Duration) *account {
	return &account{name: name, password: password, timeout: timeout, asking: make(chan struct{}, 1)}
}

// current returns the token, and asks etcd for one if there is none.
func (a *account) current(ctx context.Context) (*token, error) {
	if t := a.token.Load(); t != nil {
		return t, nil
	}
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	select {
	case a.asking <- struct{}{}:
		defer func() { <-a.asking }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if t := a.token.Load(); t != nil { // somebody else was asking
		return t, nil
	}
	t := new(token)
	resp, err := a.auth.Authenticate(ctx, &pb.AuthenticateRequest{Name: a.name, Password: a.password})
	switch {
	case errors.Is(rpctypes.Error(err), rpctypes.ErrAuthNotEnabled):
	case err != nil:
		return nil, err
	default:
		t.text = resp.Token
	}
	a.token.Store(t)
	return t, nil
}

// show adds the token to what a request carries.
func (a *account) show(ctx context.Context) (context.Context, *token, error) {
	if a == nil {
		return ctx, nil, nil
	}
	t, err := a.current(ctx)
	if err != nil || t.text == "" {
		return ctx, t, err
	}
	return metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, t.text), t, nil
}

// failed looks at the failure of a request that carried t. If etcd did not accept t, the next request takes another
// token.
func (a *account) failed(t *token, err error) {
	// A token has a raft index in it, and etcd waits until it has got there. One that was restored from a backup does
	// not for long, and says nothing: silence is no either.
	if t != nil && (wantsToken(err) || status.Code(err) == codes.DeadlineExceeded) {
		a.token.CompareAndSwap(t, nil)
	}
}

// wantsToken is whether etcd refused a request for its token alone, before it did anything.
func wantsToken(err error) bool {
	err = rpctypes.Error(err)
	return errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrAuthOldRevision) || errors.Is(err, rpctypes.ErrUserEmpty)
}

// unary is a gRPC interceptor. A request that etcd refuses for its token is made once more with another one.
//
// clientv3 waits for a connection until the context ends, and then cannot say why there was none. Failing as soon as
// an attempt failed gives the reason; trying again is the business of Held and Watch. Only what a member refuses because it has no leader
// goes to others: it is cut off from them, or they are choosing.
func (a *account) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	opts = append(opts[:len(opts):len(opts)], grpc.WaitForReady(false))
	if method == pb.Auth_Authenticate_FullMethodName {
		return next(ctx, method, req, reply, cc, opts...)
	}
	leaderless := 0
	for again := false; ; {
		with, t, err := a.show(ctx)
		if err != nil {
			return err
		}
		err = next(with, method, req, reply, cc, opts...)
		a.failed(t, err)
		switch {
		case t != nil && wantsToken(err) && !again:
			again = true
		case errors.Is(rpctypes.Error(err), rpctypes.ErrNoLeader) && leaderless < leaderlessRetries:
			leaderless++
		default:
			return err
		}
	}
}

// leaderlessRetries is how many members more are asked when one has no leader.
const leaderlessRetries = 2

// stream is the interceptor of streams. Whoever opened one that is refused opens another.
func (a *account) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	with, t, err := a.show(ctx)
	if err != nil {
		return nil, err
	}
	s, err := next(with, desc, cc, method, append(opts[:len(opts):len(opts)], grpc.WaitForReady(false))...)
	if err != nil {
		a.failed(t, err)
		return nil, err
	}
	return &accountStream{s, a, t}, nil
}

// accountStream is a stream that carries token.
type accountStream struct {
	grpc.ClientStream
	account *account
	token   *token
}

func (s *accountStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	s.account.failed(s.token, err)
	return err
}
