// Tests of the list of connections.

package nsutil

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// diagAnswer is an inet_diag_msg of a connection, as Linux 6.1 wrote it, with a mark.
func diagAnswer(mark uint32) []byte {
	b := make([]byte, diagAnswerLen, diagAnswerLen+8)
	b[0], b[1] = unix.AF_INET, 1
	binary.BigEndian.PutUint16(b[4:], 40000)
	binary.BigEndian.PutUint16(b[6:], 443)
	copy(b[8:], []byte{10, 5, 1, 2})
	copy(b[24:], []byte{192, 0, 2, 9})
	binary.NativeEndian.PutUint64(b[44:], 77)
	b = binary.NativeEndian.AppendUint16(b, 8)
	b = binary.NativeEndian.AppendUint16(b, inetDiagMark)
	return binary.NativeEndian.AppendUint32(b, mark)
}

func TestParseConnection_ReadsTheKernelsBytes(t *testing.T) {
	want := TCPConnection{Local: netip.MustParseAddrPort("10.5.1.2:40000"), Remote: netip.MustParseAddrPort("192.0.2.9:443"), Cookie: 77}
	if got, ok := parseConnection(diagAnswer(0)); !ok || got != want {
		t.Errorf("%+v, %v", got, ok)
	}
	mapped := diagAnswer(0)
	mapped[0] = unix.AF_INET6
	copy(mapped[8:], netip.MustParseAddr("::ffff:10.5.1.2").AsSlice())
	copy(mapped[24:], netip.MustParseAddr("::ffff:192.0.2.9").AsSlice())
	if got, ok := parseConnection(mapped); !ok || got != want {
		t.Errorf("mapped: %+v, %v", got, ok)
	}
	for name, b := range map[string][]byte{"Inside's": diagAnswer(insideMark | 7), "short": diagAnswer(0)[:diagAnswerLen-1], "another family": append([]byte{unix.AF_UNIX}, diagAnswer(0)[1:]...)} {
		if got, ok := parseConnection(b); ok {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func FuzzParseConnection(f *testing.F) {
	f.Add(diagAnswer(0))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, ok := parseConnection(b); ok && (c.Local.Addr().Is4In6() || c.Remote.Addr().Is4In6()) {
			t.Errorf("%+v", c)
		}
	})
}
