// This file tests what a vxlan network keeps in the store against what flannel writes, reads and refuses.

package lease

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func vxlanNetwork(t *testing.T, backend string) NetworkConfig {
	t.Helper()
	c, err := ParseConfig([]byte(`{"Network":"10.5.0.0/16","Backend":` + backend + `}`))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestVXLAN_FillsInAsFlannelDoes(t *testing.T) {
	for name, tc := range map[string]struct {
		backend string
		want    VXLANConfig
	}{
		"defaults":        {`{"Type":"vxlan"}`, VXLANConfig{VNI: 1, Port: 8472}},
		"in capitals":     {`{"Type":"VXLAN"}`, VXLANConfig{VNI: 1, Port: 8472}},
		"everything":      {`{"Type":"vxlan","VNI":42,"Port":4789,"MTU":1400,"GBP":true,"Learning":true,"DirectRouting":true}`, VXLANConfig{42, 4789, 1400, true, true, true}},
		"flannel's case":  {`{"Type":"vxlan","vni":42,"port":4789,"mtu":1400,"gbp":true,"learning":true,"directRouting":true}`, VXLANConfig{42, 4789, 1400, true, true, true}},
		"port 0":          {`{"Type":"vxlan","Port":0}`, VXLANConfig{VNI: 1, Port: 8472}},
		"VNI 0":           {`{"Type":"vxlan","VNI":0}`, VXLANConfig{VNI: 0, Port: 8472}},
		"largest":         {`{"Type":"vxlan","VNI":16777215,"Port":65535,"MTU":65535}`, VXLANConfig{VNI: 16777215, Port: 65535, MTU: 65535}},
		"smallest MTU":    {`{"Type":"vxlan","MTU":626}`, VXLANConfig{VNI: 1, Port: 8472, MTU: 626}},
		"Windows members": {`{"Type":"vxlan","Name":"flannel","MacPrefix":"0E-2A"}`, VXLANConfig{VNI: 1, Port: 8472}},
	} {
		c := vxlanNetwork(t, tc.backend)
		if got, err := c.VXLAN(); err != nil || got != tc.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, tc.want)
		}
		if port, err := c.StockPort(); err != nil || port != tc.want.Port {
			t.Errorf("%s: port %d, %v", name, port, err)
		}
	}
	udp := vxlanNetwork(t, `{"Type":"udp","Port":99}`)
	if port, err := udp.StockPort(); err != nil || port != 99 {
		t.Errorf("udp: port %d, %v", port, err)
	}
	if _, err := udp.VXLAN(); !errors.Is(err, ErrBadConfig) {
		t.Errorf("udp: %v", err)
	}
	if _, err := vxlanNetwork(t, `{"Type":"host-gw"}`).StockPort(); !errors.Is(err, ErrBadConfig) {
		t.Errorf("host-gw: %v", err)
	}
}

func TestVXLAN_RefusesWhatCannotBe(t *testing.T) {
	for backend, says := range map[string]string{
		`{"Type":"vxlan","VNI":16777216}`:       "Backend VNI 16777216 is not a number from 0 to 16777215",
		`{"Type":"vxlan","VNI":-1}`:             "Backend VNI -1 is not",
		`{"Type":"vxlan","VNI":"1"}`:            "Backend VNI is of the wrong kind",
		`{"Type":"vxlan","Port":65536}`:         "Backend Port 65536 is not a number from 1 to 65535",
		`{"Type":"vxlan","Port":-1}`:            "Backend Port -1 is not",
		`{"Type":"vxlan","Port":8472.5}`:        "Backend Port is of the wrong kind",
		`{"Type":"vxlan","MTU":625}`:            "Backend MTU 625 is not a number from 626 to 65535",
		`{"Type":"vxlan","MTU":65536}`:          "Backend MTU 65536 is not",
		`{"Type":"vxlan","DirectRouting":"no"}`: "true or false is needed",
		`{"Type":"vxlan","GBP":1}`:              "true or false is needed",
	} {
		_, err := vxlanNetwork(t, backend).VXLAN()
		if !errors.Is(err, ErrBadConfig) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v; want %q", backend, err, says)
		}
	}
}

// Origin: flannel's Documentation/reservations.md.
const goldenVXLANLease = `{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}`

func TestVXLANData_IsFlannels(t *testing.T) {
	d := VXLANData{VNI: 1, VtepMAC: [6]byte{0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44}}
	b, err := json.Marshal(Attrs{PublicIP: netip.MustParseAddr("192.168.64.3"), BackendType: "vxlan", BackendData: d.JSON()})
	if err != nil || string(b) != goldenVXLANLease {
		t.Errorf("we write\n%s, flannel\n%s; %v", b, goldenVXLANLease, err)
	}
	a, err := ParseAttrs([]byte(goldenVXLANLease))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseVXLANData("BackendData", a.BackendData); err != nil || got != d {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestParseVXLANData_RefusesWhatIsNoVTEP(t *testing.T) {
	for data, says := range map[string]string{
		``:                                     "no BackendData",
		`null`:                                 "not a MAC address",
		`[]`:                                   "BackendData is of the wrong kind",
		`"c6:d2:32:6f:8f:44"`:                  "BackendData is of the wrong kind",
		`{}`:                                   "not a MAC address",
		`{"VNI":1}`:                            "not a MAC address",
		`{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f"}`: "not a MAC address",
		`{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44:00:00"}`: "not a MAC address",
		`{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}`:       "not the address of one interface",
		`{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}`:       "not the address of one interface",
		`{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}`:       "not the address of one interface",
		`{"VNI":-1,"VtepMAC":"c6:d2:32:6f:8f:44"}`:      "BackendData VNI is of the wrong kind",
		`{"VNI":1,"VtepMAC":`:                           "not JSON",
	} {
		if _, err := ParseVXLANData("BackendV6Data", []byte(data)); err == nil || !strings.Contains(err.Error(), "BackendV6Data") || strings.Contains(err.Error(), "BackendData") {
			t.Errorf("%s in BackendV6Data: %v", data, err)
		}
		if d, err := ParseVXLANData("BackendData", []byte(data)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %+v, %v; want %q", data, d, err, says)
		}
	}
}

func FuzzParseVXLANData(f *testing.F) {
	f.Add([]byte(`{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}`))
	f.Add([]byte(`{"vni":16777215,"vtepmac":"C6-D2-32-6F-8F-44"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseVXLANData("BackendData", b)
		if err != nil {
			return
		}
		if again, err := ParseVXLANData("BackendV6Data", d.JSON()); err != nil || again != d {
			t.Fatalf("%s: %+v, %+v, %v", b, d, again, err)
		}
	})
}
