// What runs beside the API.

package node

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
)

func TestRun_HasWhatIsBesideRunFromWhenTheAPIAnswers(t *testing.T) {
	c := testConfig(t)
	c.ListenEtcd = "127.0.0.1:0"
	begun, ended := make(chan error, 1), make(chan struct{})
	c.Beside = func(ctx context.Context, _ func(string) (net.Listener, error)) error {
		defer close(ended)
		_, err := os.Stat(c.Socket())
		begun <- err
		<-ctx.Done()
		return nil
	}
	r := startNode(t, c)
	if err := <-begun; err != nil {
		t.Errorf("the runtime directory is not ours yet: %v", err)
	}
	r.ready()
	if err := r.end(); err != nil {
		t.Error(err)
	}
	<-ended
}

func TestRun_EndsWithTheErrorOfWhatIsBeside(t *testing.T) {
	c := testConfig(t)
	c.ListenEtcd = "127.0.0.1:0"
	c.Beside = func(context.Context, func(string) (net.Listener, error)) error { return errors.New("no room here") }
	r := startNode(t, c)
	<-r.ended
	if r.err == nil || !strings.Contains(r.err.Error(), "no room here") {
		t.Errorf("ended with %v", r.err)
	}
}
