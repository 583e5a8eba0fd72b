// Tests of a start on what the last run knew.

package node

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// logged has a node's log go to a text.
func logged(c *Config) *syncBuffer {
	var text syncBuffer
	c.Log = slog.New(slog.NewTextHandler(&text, nil))
	return &text
}

const atOnce = "forwarding on what the last run knew"

func TestResume_ForwardsBeforeTheStoreAnswers(t *testing.T) {
	for name, embedded := range map[string]bool{"a store of others": false, "an embedded store": true} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t)
			c.ListenEtcd = freeAddr(t)
			if !embedded {
				c = joinConfig(t, startEtcd(t, t.TempDir(), "127.0.0.1:0").Endpoint())
			}
			r := startNode(t, c)
			before := r.ready()
			if err := r.end(); err != nil {
				t.Fatal(err)
			}
			text := logged(&c)
			n, err := New(c)
			if err != nil {
				t.Fatal(err)
			}
			n.edges = newWorld().edges()
			n.patience = deadline // a busy machine's store answers late, too
			r = runNode(t, n)
			after := r.ready()
			r.until("ready in the log", func(api.Status) bool { return strings.Contains(text.String(), "msg=ready") })
			if after.Subnet != before.Subnet || after.Port != before.Port || after.NodeID != before.NodeID || !after.Store.Connected {
				t.Errorf("%+v, before %+v", after, before)
			}
			said, ready := strings.Index(text.String(), atOnce), strings.Index(text.String(), "msg=ready")
			if said < 0 || ready < said || strings.Contains(text.String(), "is away") {
				t.Errorf("log:\n%s", text)
			}
		})
	}
}

func TestResume_AsksFirstWhereItKnowsNothingOfThisStore(t *testing.T) {
	first, second := startEtcd(t, t.TempDir(), "127.0.0.1:0"), startEtcd(t, t.TempDir(), "127.0.0.1:0")
	c := joinConfig(t, first.Endpoint())
	r := startNode(t, c)
	r.ready()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	c.Etcd.Endpoints = []string{second.Endpoint()}
	text := logged(&c)
	r = startNode(t, c)
	r.ready()
	if strings.Contains(text.String(), atOnce) {
		t.Errorf("log:\n%s", text)
	}
}

func TestResume_AReplacedConfigIsFollowedByTheNextNode(t *testing.T) {
	c := joinConfig(t, startEtcd(t, t.TempDir(), "127.0.0.1:0").Endpoint())
	r := startNode(t, c)
	r.ready()
	if err := r.client.SetConfig(t.Context(), []byte(`{"Network":"10.7.0.0/16"}`)); err != nil {
		t.Fatal(err)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if err := startNode(t, c).fails(); !errors.Is(err, ErrConfigChanged) {
		t.Fatalf("Run: %v", err)
	}
	if s := startNode(t, c).ready(); s.Network != "10.7.0.0/16" {
		t.Errorf("the network is %s", s.Network)
	}
}

func TestResume_GoesOnUnconfirmedOnlyAfterAWhile(t *testing.T) {
	addr, dir := freeAddr(t), t.TempDir()
	etcd := startEtcd(t, dir, addr)
	c := joinConfig(t, etcd.Endpoint())
	r := startNode(t, c)
	r.ready()
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	etcd.Close()
	text := logged(&c)
	r = startNode(t, c)
	r.until("forwarding without the store", func(s api.Status) bool { return s.State == api.StateLeaseLost })
	if !strings.Contains(text.String(), atOnce) || strings.Contains(text.String(), "msg=ready") {
		t.Errorf("log:\n%s", text)
	}
	startEtcd(t, dir, addr)
	r.ready()
}
