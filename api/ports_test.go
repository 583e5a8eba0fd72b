// Tests of published ports.

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func TestParsePublish_ReadsDockersSyntax(t *testing.T) {
	tests := map[string][]Port{
		"8080:80":               {{HostPort: 8080, Port: 80, Proto: "tcp"}},
		"8080:80/tcp":           {{HostPort: 8080, Port: 80, Proto: "tcp"}},
		"8080:53/UDP":           {{HostPort: 8080, Port: 53, Proto: "udp"}},
		"80":                    {{Port: 80, Proto: "tcp"}},
		":80":                   {{Port: 80, Proto: "tcp"}},
		"0:80/udp":              {{Port: 80, Proto: "udp"}},
		"127.0.0.1:8080:80":     {{HostAddr: "127.0.0.1", HostPort: 8080, Port: 80, Proto: "tcp"}},
		"127.0.0.1::80":         {{HostAddr: "127.0.0.1", Port: 80, Proto: "tcp"}},
		"0.0.0.0:8080:80":       {{HostAddr: "0.0.0.0", HostPort: 8080, Port: 80, Proto: "tcp"}},
		"[::1]:8080:80":         {{HostAddr: "::1", HostPort: 8080, Port: 80, Proto: "tcp"}},
		"[2001:DB8::0:1]:1:1":   {{HostAddr: "2001:db8::1", HostPort: 1, Port: 1, Proto: "tcp"}},
		"[::]:0:53/udp":         {{HostAddr: "::", Port: 53, Proto: "udp"}},
		"8000-8001:9000-9001":   {{HostPort: 8000, Port: 9000, Proto: "tcp"}, {HostPort: 8001, Port: 9001, Proto: "tcp"}},
		"9000-9001":             {{Port: 9000, Proto: "tcp"}, {Port: 9001, Proto: "tcp"}},
		"10.0.0.1:7-7:8-8/udp":  {{HostAddr: "10.0.0.1", HostPort: 7, Port: 8, Proto: "udp"}},
		"65535:65535":           {{HostPort: 65535, Port: 65535, Proto: "tcp"}},
		"10.0.0.1::9000-9001":   {{HostAddr: "10.0.0.1", Port: 9000, Proto: "tcp"}, {HostAddr: "10.0.0.1", Port: 9001, Proto: "tcp"}},
		"0:65535":               {{Port: 65535, Proto: "tcp"}},
		"[fe80::1]:8080:80/tcp": {{HostAddr: "fe80::1", HostPort: 8080, Port: 80, Proto: "tcp"}},
	}
	for s, want := range tests {
		if got, err := ParsePublish(s); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v; want %+v", s, got, err, want)
		}
	}
}

func TestParsePublish_RefusesAndSaysWhy(t *testing.T) {
	tests := map[string]string{
		"":                        "no port of the container",
		"8080:":                   "no port of the container",
		"8080:0":                  "no port of the container",
		"8080:70000":              "no port of the container",
		"8080:-80":                "no port of the container",
		"+80:80":                  "no port of the host",
		"70000:80":                "no port of the host",
		"0-10:80-90":              "no port of the host",
		"8010-8000:90-100":        "8010-8000 runs downwards: write 8000-8010",
		"8000-8010:9010-9000":     "9010-9000 runs downwards: write 9000-9010",
		"70000-80:80":             "no port of the host",
		"[::1]:80":                "write [::1]:HOSTPORT:PORT",
		"[::1]":                   "write [::1]:HOSTPORT:PORT",
		"[::1]8080:80":            "write [::1]:HOSTPORT:PORT",
		"[::1]:1:2:3":             "no port of the container",
		"127.0.0.1:80":            "write 127.0.0.1:HOSTPORT:PORT",
		"255.255.255.255:8085:80": "no address of a host",
		"[ff02::1]:8080:80":       "no address of a host",
		"8000-8010:9000":          "11 ports of the host and 1 of the container",
		"8000:9000-9001":          "1 ports of the host and 2 of the container",
		"8080:80/sctp":            "tcp or udp",
		"8080:80/":                "tcp or udp",
		"example.org:8080:80":     "is no address",
		"::1:8080:80":             "in brackets",
		"[127.0.0.1]:8080:80":     "in brackets",
		"[::1:8080:80":            "in brackets",
		"[fe80::1%eth0]:8080:80":  "no address of a host",
		"224.0.0.1:8080:80":       "no address of a host",
		"[::ffff:1.2.3.4]:80:80":  "no address of a host",
		"1-65535":                 "more than the 4096",
		"8080:80 ":                "no port of the container",
		strings.Repeat("9", 1000): "no port of the container",
	}
	for s, want := range tests {
		_, err := ParsePublish(s)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) || len(err.Error()) > 400 {
			t.Errorf("%q: %v, want %q", s, err, want)
		}
	}
}

func FuzzParsePublish(f *testing.F) {
	for _, s := range []string{"8080:80", "[::1]:0:53/udp", "10.0.0.1:8000-8010:9000-9010", ":80", "80", "a:b:c/d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		list, err := ParsePublish(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%q: %v is not ErrInvalid", s, err)
			}
			return
		}
		if len(list) == 0 || len(list) > MaxPorts {
			t.Errorf("%q: %d ports", s, len(list))
		}
		for i, p := range list {
			if p.Port < 1 || p.Port > 65535 || p.HostPort < 0 || p.HostPort > 65535 || p.Proto != ProtoTCP && p.Proto != ProtoUDP {
				t.Errorf("%q: %+v", s, p)
			}
			if p.HostPort != 0 && !p.follows(list[0], i) {
				t.Errorf("%q: %+v is not %d after %+v", s, p, i, list[0])
			}
		}
	})
}

// CNI runtimes list ranges port by port.
func TestAttach_TakesAsManyPortsAsOneMayHave(t *testing.T) {
	r := AttachRequest{PID: 1}
	for i := range MaxPorts {
		r.Publish = append(r.Publish, fmt.Sprintf("[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:%d:%d/udp", 60000-i, 10000+i))
	}
	body, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodeAttach(bytes.NewReader(body)); err != nil || len(got.Publish) != MaxPorts {
		t.Errorf("%d bytes: %v", len(body), err)
	}
}

func TestPortsText_IsAsDockersAndJoinsNeighbours(t *testing.T) {
	var list []Port
	for _, s := range []string{"8080:80", "[::1]:53:53/udp", "8000-8010:9000-9010", "127.0.0.1:1-2:1-2/udp", "0.0.0.0:7:7", "[::]:8:8"} {
		more, err := ParsePublish(s)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, more...)
	}
	list = append(list, Port{HostPort: 9, Port: 9, Proto: "tcp"}, Port{HostPort: 10, Port: 10, Proto: "tcp", SNAT: true})
	want := "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp, [::1]:53->53/udp, 0.0.0.0:8000-8010->9000-9010/tcp, [::]:8000-8010->9000-9010/tcp, " +
		"127.0.0.1:1-2->1-2/udp, 0.0.0.0:7->7/tcp, [::]:8->8/tcp, 0.0.0.0:9->9/tcp, [::]:9->9/tcp, 0.0.0.0:10->10/tcp, [::]:10->10/tcp (snat)"
	if got := PortsText(list); got != want {
		t.Errorf("\n got %s\nwant %s", got, want)
	}
	if got := PortsText(nil); got != "" {
		t.Errorf("no port: %q", got)
	}
}

func TestUnpublishRequest_PicksWhatTheSpecsMean(t *testing.T) {
	var published []Port
	for _, s := range []string{"8080:80", "8081:80", "127.0.0.1:8082:80", "8080:80/udp", "9000-9002:9000-9002"} {
		list, err := ParsePublish(s)
		if err != nil {
			t.Fatal(err)
		}
		published = append(published, list...)
	}
	tests := []struct {
		specs []string
		want  string
	}{
		{[]string{"8080:80"}, "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp"},
		{[]string{"80/udp"}, "0.0.0.0:8080->80/udp, [::]:8080->80/udp"},
		{[]string{"80"}, "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp, 0.0.0.0:8081->80/tcp, [::]:8081->80/tcp, 127.0.0.1:8082->80/tcp"},
		{[]string{"127.0.0.1::80"}, "127.0.0.1:8082->80/tcp"},
		{[]string{"8082:80", "9001:9001", "9001:9001"}, "127.0.0.1:8082->80/tcp, 0.0.0.0:9001->9001/tcp, [::]:9001->9001/tcp"},
		{[]string{"9000-9002:9000-9002"}, "0.0.0.0:9000-9002->9000-9002/tcp, [::]:9000-9002->9000-9002/tcp"},
	}
	for _, tt := range tests {
		got, err := UnpublishRequest{Publish: tt.specs}.Pick(published)
		if err != nil || PortsText(got) != tt.want {
			t.Errorf("%v: %s, %v; want %s", tt.specs, PortsText(got), err, tt.want)
		}
	}
	if got, err := (UnpublishRequest{All: true}).Pick(published); err != nil || len(got) != len(published) {
		t.Errorf("all: %v, %v", got, err)
	}
	for _, s := range []string{"8080:81", "8083:80", "10.0.0.1:8080:80", "9000-9003:9000-9003", "9000:9000/udp"} {
		if _, err := (UnpublishRequest{Publish: []string{"8080:80", s}}).Pick(published); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), s) {
			t.Errorf("%s: %v", s, err)
		}
	}
}

func TestAttachRequest_PublishGoesWithSomeAttachmentsOnly(t *testing.T) {
	tests := []struct {
		req  AttachRequest
		want string
	}{
		{AttachRequest{PID: 1, Publish: []string{"8080:80"}}, ""},
		{AttachRequest{PID: 1, Publish: []string{"8080:80"}, NoDefaultRoute: true, SNAT: true}, ""},
		{AttachRequest{PID: 1, Publish: []string{"8080:80"}, NoDefaultRoute: true}, "--snat"},
		{AttachRequest{PID: 1, Publish: []string{"8080:80"}, Gateway: true}, "by their engine"},
		{AttachRequest{PID: 1, Publish: []string{"8080:80", "x"}}, `"x" cannot be published`},
		{AttachRequest{PID: 1, SNAT: true}, "none is given"},
	}
	for _, tt := range tests {
		err := tt.req.Validate()
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%+v: %v, want %q", tt.req, err, tt.want)
		}
	}
}

func TestClient_PublishesAndUnpublishes(t *testing.T) {
	b := &fakeBackend{}
	c := serve(t, b)
	ctx := context.Background()
	list, err := c.Publish(ctx, "web", PublishRequest{Publish: []string{"8080:80", "53/udp"}, SNAT: true})
	if err != nil || len(list) != 2 || !list[0].SNAT || list[1].Proto != ProtoUDP {
		t.Errorf("Publish: %+v, %v", list, err)
	}
	if list, err := c.Unpublish(ctx, "4711", UnpublishRequest{Publish: []string{"8080:80"}}); err != nil || list == nil || len(list) != 0 {
		t.Errorf("Unpublish: %#v, %v", list, err)
	}
	if want := []string{"web 8080:80 53/udp"}; !reflect.DeepEqual(b.published, want) {
		t.Errorf("published %q", b.published)
	}
	if want := []string{"4711 8080:80"}; !reflect.DeepEqual(b.unpublished, want) {
		t.Errorf("unpublished %q", b.unpublished)
	}
	for name, err := range map[string]error{
		"no port":      second(c.Publish(ctx, "web", PublishRequest{})),
		"a bad port":   second(c.Publish(ctx, "web", PublishRequest{Publish: []string{"x"}})),
		"a bad name":   second(c.Publish(ctx, "../x", PublishRequest{Publish: []string{"80"}})),
		"nothing":      second(c.Unpublish(ctx, "web", UnpublishRequest{})),
		"all and some": second(c.Unpublish(ctx, "web", UnpublishRequest{All: true, Publish: []string{"80"}})),
		"a bad spec":   second(c.Unpublish(ctx, "web", UnpublishRequest{Publish: []string{"x"}})),
	} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func FuzzDecodePublish(f *testing.F) {
	f.Add(`{"publish":["8080:80"],"snat":true}`)
	f.Add(`{"all":true}`)
	f.Add(`{"publish":[1]}`)
	f.Fuzz(func(t *testing.T, body string) {
		if _, err := decodePublish(strings.NewReader(body)); err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("publish %q: %v", body, err)
		}
		if _, err := decodeUnpublish(strings.NewReader(body)); err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("unpublish %q: %v", body, err)
		}
	})
}
