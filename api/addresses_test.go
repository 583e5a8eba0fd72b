// Tests of the requests about reserved addresses, and of those about interfaces that somebody else configures.

package api

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestAddresses_ReachTheBackend(t *testing.T) {
	b := &fakeBackend{}
	c := serve(t, b)
	got, err := c.ReserveAddress(t.Context(), AddressRequest{Addr: "10.213.7.9", Owner: "docker/12ab"})
	if err != nil || got.Addr != "10.213.7.9/24" || got.Owner != "docker/12ab" {
		t.Fatalf("reserved %+v, %v", got, err)
	}
	if list, err := c.Addresses(t.Context()); err != nil || !slices.Equal(list, []Address{got}) {
		t.Errorf("list: %+v, %v", list, err)
	}
	if err := c.ReleaseAddress(t.Context(), "10.213.7.9"); err != nil {
		t.Error(err)
	}
	if list, err := c.Addresses(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("list after the release: %+v, %v", list, err)
	}
	b.err = Errorf(CodeExhausted, "none left")
	if _, err := c.ReserveAddress(t.Context(), AddressRequest{}); !errors.Is(err, ErrExhausted) {
		t.Errorf("a refusal came as %v", err)
	}
}

func TestAddressRequest_ValidateRefuses(t *testing.T) {
	for _, r := range []AddressRequest{{Addr: "x"}, {Addr: "10.213.7.9/24"}, {Addr: "fd00::9"}, {Owner: strings.Repeat("x", 256)}, {Owner: "a\nb"}} {
		if err := r.Validate(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if err := serve(t, &fakeBackend{}).ReleaseAddress(t.Context(), "10.213.7.9/24"); !errors.Is(err, ErrInvalid) {
		t.Errorf("release with a length: %v", err)
	}
}

func TestAttachRequest_LooseValidates(t *testing.T) {
	many := slices.Repeat([]string{"10.0.2.3"}, maxDNSAt)
	for _, tc := range []struct {
		r  AttachRequest
		ok bool
	}{
		{AttachRequest{PID: 1, Loose: true, Addr: "10.213.7.9", NoIPv6: true}, true},
		{AttachRequest{PID: 1, DNSAt: many}, true},
		{AttachRequest{PID: 1, DNSAt: []string{"fd00::3", "169.254.1.1"}}, true},
		{AttachRequest{PID: 1, DNSAt: append(many, "10.0.2.4")}, false},
		{AttachRequest{PID: 1, DNSAt: []string{"127.0.0.11"}}, false},
		{AttachRequest{PID: 1, DNSAt: []string{"10.0.2.3:53"}}, false},
		{AttachRequest{PID: 1, DNSAt: []string{"0.0.0.0"}}, false},
		{AttachRequest{PID: 1, DNSAt: []string{"224.0.0.251"}}, false},
		{AttachRequest{PID: 1, DNSAt: []string{"fe80::1%eth0"}}, false},
		{AttachRequest{PID: 1, Gateway: true, DNSAt: []string{"10.0.2.3"}}, false},
		{AttachRequest{PID: 1, Gateway: true, Loose: true}, false},
		{AttachRequest{Loose: true}, false},
	} {
		if err := tc.r.Validate(); (err == nil) != tc.ok || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", tc.r, err)
		}
	}
}
