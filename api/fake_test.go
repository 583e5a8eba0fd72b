// A Backend for the tests, and a way to have it behind a real socket.

package api

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
)

// fakeBackend answers from its fields and notes what it was asked.
type fakeBackend struct {
	status      Status
	attachments []Attachment
	peers       []Peer
	err         error // what every method fails with
	carry       func(ctx context.Context, to string, s *Stream)

	mu           sync.Mutex
	config       json.RawMessage
	attached     []AttachRequest
	detached     []string
	detachedSoon []string
	renamed      []string
	caller       int // of the last attach

	published, unpublished []string
	addresses              []Address
}

func (f *fakeBackend) Status(context.Context) (Status, error) { return f.status, f.err }

func (f *fakeBackend) Attach(ctx context.Context, r AttachRequest) (Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.caller, _ = CallerPID(ctx)
	f.attached = append(f.attached, r)
	return Attachment{Name: r.Name, PID: r.PID, Netns: r.Netns, Addr: "10.213.7.2/24"}, f.err
}

func (f *fakeBackend) Detach(_ context.Context, ref, owner string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.detached = append(f.detached, ref+owner)
	return f.err
}

func (f *fakeBackend) DetachSoon(_ context.Context, ref, owner string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.detachedSoon = append(f.detachedSoon, ref+owner)
	return f.err
}

func (f *fakeBackend) Rename(_ context.Context, ref string, r NamesRequest) (Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.renamed = append(f.renamed, ref)
	return Attachment{Name: r.Name, Aliases: r.Aliases}, f.err
}

func (f *fakeBackend) Publish(_ context.Context, ref string, r PublishRequest) ([]Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.published = append(f.published, ref+" "+strings.Join(r.Publish, " "))
	list, err := r.Ports()
	return list, errors.Join(err, f.err)
}

func (f *fakeBackend) Unpublish(_ context.Context, ref string, r UnpublishRequest) ([]Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unpublished = append(f.unpublished, ref+" "+strings.Join(r.Publish, " "))
	return nil, f.err
}

func (f *fakeBackend) ReserveAddress(_ context.Context, r AddressRequest) (Address, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := Address{Addr: r.Addr + "/24", Gateway: "10.213.7.1", Owner: r.Owner}
	f.addresses = append(f.addresses, a)
	return a, f.err
}

func (f *fakeBackend) ReleaseAddress(_ context.Context, addr string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.addresses = slices.DeleteFunc(f.addresses, func(a Address) bool { return a.Addr == addr+"/24" })
	return f.err
}

func (f *fakeBackend) Addresses(context.Context) ([]Address, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.addresses), f.err
}

func (f *fakeBackend) Attachments(context.Context) ([]Attachment, error) { return f.attachments, f.err }
func (f *fakeBackend) Peers(context.Context) ([]Peer, error)             { return f.peers, f.err }

func (f *fakeBackend) Config(context.Context) (json.RawMessage, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.config, f.err
}

func (f *fakeBackend) SetConfig(_ context.Context, raw json.RawMessage) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.config = raw
	}
	return f.err
}

func (f *fakeBackend) Forward(ctx context.Context, to string, accept func() (*Stream, error)) error {
	if f.err != nil {
		return f.err
	}
	s, err := accept()
	if err == nil {
		f.carry(ctx, to, s)
	}
	return err
}

// shortDir is a directory whose socket path fits in sun_path, which t.TempDir's may not.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ovl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// serve has b on a socket of its own until the test ends.
func serve(t *testing.T, b Backend) *Client {
	t.Helper()
	ln, err := Listen(shortDir(t) + "/run")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, Handler(b), slog.New(slog.DiscardHandler)) }()
	c := NewClient(ln.Path())
	t.Cleanup(func() {
		c.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return c
}
