// Addresses that are kept for an engine: its plugins choose a container's address before there is anything to attach, and give it back when
// the container has gone.

package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"time"
)

// PathAddresses is the list of reserved addresses: GET lists, POST reserves one, DELETE PathAddresses/{address} releases it.
const PathAddresses = "/v1/addresses"

// AddressRequest asks for an address of the node's subnet.
type AddressRequest struct {
	Addr  string `json:"addr,omitempty"`  // IPv4 address without length; default: a free one
	Owner string `json:"owner,omitempty"` // for whom, as an engine calls it; who asks for the same address again gets it again
}

// Address is an address that no attachment gets unless it asks for it. It is kept, over restarts of the daemon, until it is released.
type Address struct {
	Addr       string    `json:"addr"`            // CIDR: the address with the subnet's length
	Addr6      string    `json:"addr6,omitempty"` // what an attachment with it has beside, in a dual-stack overlay
	Gateway    string    `json:"gateway"`
	Gateway6   string    `json:"gateway6,omitempty"`
	Owner      string    `json:"owner,omitempty"`
	Attachment string    `json:"attachment,omitempty"` // the name of the one that has it now
	Since      time.Time `json:"since"`
}

// Validate checks what can be checked without the node. Its errors have CodeInvalid.
func (r AddressRequest) Validate() error {
	if r.Addr != "" {
		if err := checkIPv4(r.Addr); err != nil {
			return err
		}
	}
	if r.Owner != "" {
		return CheckOwner(r.Owner)
	}
	return nil
}

func checkIPv4(s string) error {
	if addr, err := netip.ParseAddr(s); err != nil || !addr.Is4() {
		return Errorf(CodeInvalid, "%q is not an IPv4 address: write it without a length, as 10.213.7.20", clip(s))
	}
	return nil
}

// addressesActions answer requests about PathAddresses.
func addressesActions(b Backend) map[string]action {
	return map[string]action{
		http.MethodGet: func(r *http.Request) (any, error) {
			list, err := b.Addresses(r.Context())
			return orEmpty(list), err
		},
		http.MethodPost: func(r *http.Request) (any, error) {
			var req AddressRequest
			if err := decodeStrict(r.Body, &req, "an address request"); err != nil {
				return nil, err
			}
			if err := req.Validate(); err != nil {
				return nil, err
			}
			return b.ReserveAddress(r.Context(), req)
		},
	}
}

// addressActions answer requests about PathAddresses/{addr}.
func addressActions(b Backend) map[string]action {
	return map[string]action{
		http.MethodDelete: func(r *http.Request) (any, error) {
			addr := r.PathValue("addr")
			if err := checkIPv4(addr); err != nil {
				return nil, err
			}
			return nil, b.ReleaseAddress(r.Context(), addr)
		},
	}
}

// ReserveAddress has an address kept.
func (c *Client) ReserveAddress(ctx context.Context, r AddressRequest) (Address, error) {
	var a Address
	if err := r.Validate(); err != nil {
		return a, err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return a, fmt.Errorf("address request: %w", err)
	}
	err = c.do(ctx, http.MethodPost, PathAddresses, body, &a)
	return a, err
}

// ReleaseAddress gives a reserved address, without length, back. ErrNotFound: it is not reserved.
func (c *Client) ReleaseAddress(ctx context.Context, addr string) error {
	if err := checkIPv4(addr); err != nil {
		return err
	}
	return c.do(ctx, http.MethodDelete, PathAddresses+"/"+url.PathEscape(addr), nil, nil)
}

// Addresses lists the reserved addresses.
func (c *Client) Addresses(ctx context.Context) ([]Address, error) {
	var list []Address
	err := c.do(ctx, http.MethodGet, PathAddresses, nil, &list)
	return list, err
}
