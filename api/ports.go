// Published ports: their type, docker's way of writing them, and the requests about them.

package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// Port is a port of the host that leads to a port of an attachment.
type Port struct {
	HostAddr string `json:"host_addr,omitempty"` // empty: all addresses of the host, of both families; 0.0.0.0 and ::: all of one
	HostPort int    `json:"host_port"`           // in a request 0: one that is free
	Port     int    `json:"port"`                // of the container
	Proto    string `json:"proto"`               // tcp or udp
	SNAT     bool   `json:"snat,omitempty"`      // clients are shown to the container as the gateway
	Problem  string `json:"problem,omitempty"`   // why it does not work now; empty when all is well

	Counters map[string]uint64 `json:"counters,omitempty"`
}

// What Port.Proto may say.
const (
	ProtoTCP = "tcp"
	ProtoUDP = "udp"
)

// String writes the port as `docker ps` does: 0.0.0.0:8080->80/tcp, [::]:8080->80/tcp.
func (p Port) String() string { return p.text(1) }

// text is n ports that follow each other, p first: one entry, or one a family where all addresses of both are meant.
func (p Port) text(n int) string {
	ends := func(first int) string {
		if n == 1 {
			return strconv.Itoa(first)
		}
		return fmt.Sprintf("%d-%d", first, first+n-1)
	}
	addrs := []string{p.HostAddr}
	if p.HostAddr == "" {
		addrs = []string{"0.0.0.0", "::"}
	}
	for i, addr := range addrs {
		addrs[i] = net.JoinHostPort(addr, ends(p.HostPort)) + "->" + ends(p.Port) + "/" + p.Proto
	}
	text := strings.Join(addrs, ", ")
	if p.SNAT {
		text += " (snat)"
	}
	return text
}

// PortsText writes a list of ports as `docker ps` does, neighbours as a range: 127.0.0.1:8000-8010->9000-9010/tcp.
func PortsText(list []Port) string {
	var texts []string
	for i := 0; i < len(list); {
		n := 1
		for i+n < len(list) && list[i+n].follows(list[i], n) {
			n++
		}
		texts = append(texts, list[i].text(n))
		i += n
	}
	return strings.Join(texts, ", ")
}

// follows tells whether p is n ports after first, at both ends.
func (p Port) follows(first Port, n int) bool {
	return p.HostAddr == first.HostAddr && p.Proto == first.Proto && p.SNAT == first.SNAT && p.HostPort == first.HostPort+n && p.Port == first.Port+n
}

// MaxPorts is how many ports one attachment may have published.
const MaxPorts = 4096

// ParsePublish reads docker's way of writing published ports: [IP:]HOSTPORT:PORT[/tcp|udp]. Each of the two may be a range of the same
// length; IPv6 addresses stand in brackets; HOSTPORT empty or 0, or PORT alone, is any free port of the host. Errors have CodeInvalid.
func ParsePublish(s string) ([]Port, error) {
	bad := func(format string, args ...any) ([]Port, error) {
		return nil, Errorf(CodeInvalid, "%q cannot be published: %s", clip(s), fmt.Sprintf(format, args...))
	}
	rest, proto, given := strings.Cut(s, "/")
	if !given {
		proto = ProtoTCP
	}
	if proto = strings.ToLower(proto); proto != ProtoTCP && proto != ProtoUDP {
		return bad("the protocol is tcp or udp, not %q", clip(proto))
	}
	addr, host, inside, why := cutPublish(rest)
	if why != "" {
		return bad("%s", why)
	}
	first, last, ok := portRange(inside)
	switch {
	case first > last:
		return bad("the range %s runs downwards: write %d-%d", inside, last, first)
	case !ok || first == 0:
		return bad("%q is no port of the container: use 1 to 65535, or a range as 9000-9010", clip(inside))
	}
	hostFirst, hostLast := 0, 0
	if host != "" {
		hostFirst, hostLast, ok = portRange(host)
		switch {
		case hostFirst > hostLast:
			return bad("the range %s runs downwards: write %d-%d", host, hostLast, hostFirst)
		case !ok || hostFirst == 0 && hostLast != 0:
			return bad("%q is no port of the host: use 1 to 65535, a range as 8000-8010, or 0 for any that is free", clip(host))
		}
	}
	if hostFirst != 0 && hostLast-hostFirst != last-first {
		return bad("%d ports of the host and %d of the container: ranges are of the same length", hostLast-hostFirst+1, last-first+1)
	}
	if last-first >= MaxPorts {
		return bad("%d ports are more than the %d that one container may have", last-first+1, MaxPorts)
	}
	list := make([]Port, 0, last-first+1)
	for i := 0; first+i <= last; i++ {
		p := Port{HostAddr: addr, Port: first + i, Proto: proto}
		if hostFirst != 0 {
			p.HostPort = hostFirst + i
		}
		list = append(list, p)
	}
	return list, nil
}

// cutPublish cuts [IP:]HOSTPORT:PORT in its parts, of which only the address has been looked at; why says what is wrong with that.
func cutPublish(s string) (addr, host, inside, why string) {
	text, bracketed := "", strings.HasPrefix(s, "[")
	switch {
	case bracketed:
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", "", "", "an IPv6 address stands in brackets, as in [::1]:8080:80"
		}
		ports, begins := strings.CutPrefix(s[end+1:], ":")
		var two bool
		if host, inside, two = strings.Cut(ports, ":"); !begins || !two {
			return "", "", "", fmt.Sprintf("after an address come the host's port and the container's: write %s:HOSTPORT:PORT", clip(s[:end+1]))
		}
		text = s[1:end]
	case strings.Count(s, ":") > 1:
		last := strings.LastIndexByte(s, ':')
		before := strings.LastIndexByte(s[:last], ':')
		text, host, inside = s[:before], s[before+1:last], s[last+1:]
		if strings.ContainsRune(text, ':') {
			return "", "", "", "an IPv6 address stands in brackets, as in [::1]:8080:80"
		}
	case strings.ContainsRune(s, ':'):
		host, inside, _ = strings.Cut(s, ":")
		if _, err := netip.ParseAddr(host); err == nil {
			return "", "", "", fmt.Sprintf("after an address come the host's port and the container's: write %s:HOSTPORT:PORT", host)
		}
		return "", host, inside, ""
	default:
		return "", "", s, ""
	}
	a, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return "", "", "", fmt.Sprintf("%q is no address: write [IP:]HOSTPORT:PORT[/tcp|udp], as 8080:80 or 127.0.0.1:8080:80", clip(text))
	case a.Is6() != bracketed:
		return "", "", "", "an IPv6 address stands in brackets, an IPv4 address does not"
	case a.Zone() != "" || a.Is4In6() || a.IsMulticast() || a == broadcast:
		return "", "", "", fmt.Sprintf("%v is no address of a host that a port can be published on", a)
	}
	return a.String(), host, inside, ""
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// portRange reads N or N-M; first is above last where M is below N.
func portRange(s string) (first, last int, ok bool) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	a, err := strconv.ParseUint(from, 10, 16) // which takes no sign
	b, err2 := strconv.ParseUint(to, 10, 16)
	if err != nil || err2 != nil {
		return 0, 0, false
	}
	return int(a), int(b), a <= b
}

// PublishRequest asks for ports of an attachment to be published: all of them, or none.
type PublishRequest struct {
	Publish []string `json:"publish"`        // as ParsePublish reads them
	SNAT    bool     `json:"snat,omitempty"` // show clients to the container as the gateway
}

// Ports are the ports that the request means. Errors have CodeInvalid.
func (r PublishRequest) Ports() ([]Port, error) {
	if len(r.Publish) == 0 {
		return nil, Errorf(CodeInvalid, "no port is given: write [IP:]HOSTPORT:PORT[/tcp|udp], as 8080:80")
	}
	return parseAll(r.Publish, r.SNAT)
}

func parseAll(specs []string, snat bool) ([]Port, error) {
	var all []Port
	for _, s := range specs {
		list, err := ParsePublish(s)
		if err != nil {
			return nil, err
		}
		if all = append(all, list...); len(all) > MaxPorts {
			return nil, Errorf(CodeInvalid, "more than %d ports for one container", MaxPorts)
		}
	}
	for i := range all {
		all[i].SNAT = snat
	}
	return all, nil
}

// UnpublishRequest asks for published ports to be closed: those that the specs name, or all. A spec without an address or without a port of
// the host means any.
type UnpublishRequest struct {
	Publish []string `json:"publish,omitempty"`
	All     bool     `json:"all,omitempty"`
}

// Pick chooses from the ports of an attachment those that the request means. A spec that means none is an error with CodeNotFound.
func (r UnpublishRequest) Pick(published []Port) ([]Port, error) {
	if r.All {
		return published, nil
	}
	picked := make([]bool, len(published))
	for _, s := range r.Publish {
		list, err := ParsePublish(s)
		if err != nil {
			return nil, err
		}
		for _, want := range list {
			found := false
			for i, p := range published {
				if want.means(p) {
					picked[i], found = true, true
				}
			}
			if !found {
				return nil, Errorf(CodeNotFound, "no such port is published: %s; `rootless-ovl ps` lists those that are", s)
			}
		}
	}
	var list []Port
	for i, p := range published {
		if picked[i] {
			list = append(list, p)
		}
	}
	return list, nil
}

// means tells whether a spec of unpublish means a published port.
func (p Port) means(published Port) bool {
	return p.Proto == published.Proto && p.Port == published.Port &&
		(p.HostPort == 0 || p.HostPort == published.HostPort) && (p.HostAddr == "" || p.HostAddr == published.HostAddr)
}

func (r UnpublishRequest) validate() error {
	if r.All == (len(r.Publish) > 0) {
		return Errorf(CodeInvalid, "either the ports to unpublish are given, as 8080:80, or all of them are meant")
	}
	_, err := parseAll(r.Publish, false)
	return err
}

// validatePublish is the part of AttachRequest.Validate about published ports.
func (r AttachRequest) validatePublish() error {
	switch {
	case len(r.Publish) == 0 && r.SNAT:
		return Errorf(CodeInvalid, "--snat is about published ports, and none is given: add --publish")
	case len(r.Publish) == 0:
		return nil
	case r.Gateway:
		return Errorf(CodeInvalid, "ports of the containers behind --gateway are published by their engine (docker run -p): leave --publish out")
	case r.NoDefaultRoute && !r.SNAT:
		return needsSNAT()
	}
	_, err := PublishRequest{Publish: r.Publish, SNAT: r.SNAT}.Ports()
	return err
}

// needsSNAT is the error of publishing a port of a container whose answers to clients would not come to the gateway.
func needsSNAT() error {
	return Errorf(CodeInvalid, "the container's default route does not lead to the overlay, so its answers to clients would leave elsewhere: publish with --snat, and it sees the gateway's address instead of theirs")
}

// Check tells whether the ports can be published for an attachment. Errors have CodeInvalid.
func (r PublishRequest) Check(a Attachment) error {
	switch {
	case a.WholeSubnet:
		return Errorf(CodeInvalid, "%q is the gateway of a whole subnet: ports of the containers behind it are published by their engine (docker run -p)", a.Name)
	case !a.DefaultRoute && !r.SNAT:
		return needsSNAT()
	}
	return nil
}

// portActions answer requests about PathAttachments/{ref}/ports.
func portActions(b Backend) map[string]action {
	return map[string]action{
		http.MethodPost: func(r *http.Request) (any, error) {
			ref, err := refOf(r)
			if err != nil {
				return nil, err
			}
			req, err := decodePublish(r.Body)
			if err != nil {
				return nil, err
			}
			list, err := b.Publish(r.Context(), ref, req)
			return orEmpty(list), err
		},
		http.MethodDelete: func(r *http.Request) (any, error) {
			ref, err := refOf(r)
			if err != nil {
				return nil, err
			}
			req, err := decodeUnpublish(r.Body)
			if err != nil {
				return nil, err
			}
			list, err := b.Unpublish(r.Context(), ref, req)
			return orEmpty(list), err
		},
	}
}

// decodePublish reads a PublishRequest strictly and validates it.
func decodePublish(body io.Reader) (PublishRequest, error) {
	var req PublishRequest
	if err := decodeStrict(body, &req, "a publish request"); err != nil {
		return req, err
	}
	_, err := req.Ports()
	return req, err
}

// decodeUnpublish is decodePublish for an UnpublishRequest.
func decodeUnpublish(body io.Reader) (UnpublishRequest, error) {
	var req UnpublishRequest
	if err := decodeStrict(body, &req, "an unpublish request"); err != nil {
		return req, err
	}
	return req, req.validate()
}

// Publish publishes ports of an attachment, found by name or pid, and gives them back with the host's ports that were chosen.
func (c *Client) Publish(ctx context.Context, nameOrPID string, r PublishRequest) ([]Port, error) {
	if _, err := r.Ports(); err != nil {
		return nil, err
	}
	return c.askPorts(ctx, http.MethodPost, nameOrPID, r)
}

// Unpublish closes published ports of an attachment and gives back which.
func (c *Client) Unpublish(ctx context.Context, nameOrPID string, r UnpublishRequest) ([]Port, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	return c.askPorts(ctx, http.MethodDelete, nameOrPID, r)
}

func (c *Client) askPorts(ctx context.Context, method, nameOrPID string, r any) ([]Port, error) {
	if err := CheckRef(nameOrPID); err != nil {
		return nil, err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("request about ports: %w", err)
	}
	var list []Port
	err = c.do(ctx, method, PathAttachments+"/"+url.PathEscape(nameOrPID)+"/ports", body, &list)
	return list, err
}
