// This file asks dockerd itself: its list of containers, one container, its events.

package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	// maxAnswer is the most bytes of a list or of one container that are read.
	maxAnswer = 64 << 20
	// maxEvent is the most bytes of one event that are read, about.
	maxEvent = 1 << 20
	// answerLimit is how long dockerd may take: it answers about a container only when it has started.
	answerLimit = 2 * time.Minute
)

// dockerd is one dockerd's API. It is safe for many goroutines.
type dockerd struct{ http *http.Client }

func newDockerd(socket string) *dockerd {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &dockerd{http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute}}}
}

func (d *dockerd) close() { d.http.CloseIdleConnections() }

// errNotThere is the error of a container that dockerd has not.
var errNotThere = errors.New("it is not there")

// identity is which dockerd it is, whatever the socket. Those of one user may have one ID, which was kept in the user's configuration once, but
// never one directory.
type identity struct{ ID, DockerRootDir string }

func (d *dockerd) identity(ctx context.Context) (identity, error) {
	ctx, cancel := context.WithTimeout(ctx, identityLimit)
	defer cancel()
	var i identity
	err := d.get(ctx, "/info", &i)
	return i, err
}

// container is what is read of one.
type container struct {
	ID              string `json:"Id"`
	Name            string
	NetworkSettings struct {
		Networks map[string]endpointSettings
	}
}

type endpointSettings struct {
	EndpointID string
	IPAddress  string
	Aliases    []string
}

// event is what is read of one: what happened to which container.
type event struct {
	Type   string
	Action string
	Actor  struct {
		ID         string
		Attributes map[string]string
	}
}

// containerID is the container that an event is about, "" if none that matters here.
func (e event) containerID() string {
	switch {
	case e.Type == "network" && e.Action == "connect":
		return e.Actor.Attributes["container"]
	case e.Type == "container" && (e.Action == "rename" || e.Action == "start"):
		return e.Actor.ID
	}
	return ""
}

// running lists the running containers, without their aliases.
func (d *dockerd) running(ctx context.Context) ([]container, error) {
	var list []container
	err := d.get(ctx, "/containers/json", &list)
	return list, err
}

// listed is a container of a list, where its state is a word.
type listed struct {
	container
	State string
}

// all lists the containers that are not running too.
func (d *dockerd) all(ctx context.Context) ([]listed, error) {
	var list []listed
	err := d.get(ctx, "/containers/json?all=1", &list)
	return list, err
}

// inspect waits until a container that is being started has been.
func (d *dockerd) inspect(ctx context.Context, id string) (container, error) {
	var c container
	if err := checkID("container", id); err != nil {
		return c, err
	}
	err := d.get(ctx, "/containers/"+url.PathEscape(id)+"/json", &c)
	return c, err
}

// events calls happened for each event, from now until ctx ends or dockerd goes away; open is called when it has begun.
func (d *dockerd) events(ctx context.Context, open func(), happened func(event)) error {
	filters, err := json.Marshal(map[string][]string{"type": {"network", "container"}, "event": {"connect", "rename", "start"}})
	if err != nil {
		return err
	}
	resp, err := d.request(ctx, "/events?filters="+url.QueryEscape(string(filters)))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	open()
	body := &io.LimitedReader{R: resp.Body}
	for dec := json.NewDecoder(body); ; {
		var e event
		body.N = maxEvent
		if err := dec.Decode(&e); err != nil {
			return err
		}
		happened(e)
	}
}

func (d *dockerd) get(ctx context.Context, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	resp, err := d.request(ctx, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("dockerd's answer to %s: %w", path, err)
	}
	return nil
}

func (d *dockerd) request(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := d.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1024)) // the status says enough
		err := fmt.Errorf("dockerd answers %s with %s: %s", path, resp.Status, strings.TrimSpace(string(text)))
		if resp.StatusCode == http.StatusNotFound {
			err = fmt.Errorf("%w: %w", errNotThere, err)
		}
		return nil, err
	}
	return resp, nil
}
