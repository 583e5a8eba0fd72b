// This file asks dockerd itself: its list of containers, one container, its events.

package docker

import (
	"context"
	"encoding/json"
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
	for dec := json.NewDecoder(resp.Body); ; {
		var e event
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
		return nil, fmt.Errorf("dockerd answers %s with %s: %s", path, resp.Status, strings.TrimSpace(string(text)))
	}
	return resp, nil
}
