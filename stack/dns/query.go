// This file reads and writes DNS messages: the parser of what containers send, and the check of what servers answer.

package dns

import (
	"bytes"
	"encoding/binary"
	"errors"

	"github.com/miekg/dns"
)

// Sizes in bytes (RFC 1035 section 4).
const (
	headerSize  = 12
	maxMessage  = 65535
	plainUDP    = 512 // what a datagram may hold when the query says nothing else
	questionEnd = 4   // QTYPE and QCLASS behind the name
)

var errMalformed = errors.New("dns: not a query")

// query is what the resolver knows of a container's message.
type query struct {
	wire     []byte // the message; its identifier is the container's
	end      int    // where the question section ends
	opcode   int
	datagram int // the largest datagram that the container takes as an answer, in bytes
}

// parseQuery reads a container's message. It is the first to look at these bytes.
func parseQuery(b []byte) (query, error) {
	if len(b) < headerSize || len(b) > maxMessage {
		return query{}, errMalformed
	}
	var m dns.Msg
	if err := m.Unpack(b); err != nil || m.Response || len(m.Question) != 1 {
		return query{}, errMalformed
	}
	_, end, err := dns.UnpackDomainName(b, headerSize)
	if err != nil || end+questionEnd > len(b) {
		return query{}, errMalformed
	}
	q := query{wire: b, end: end + questionEnd, opcode: m.Opcode, datagram: plainUDP}
	if opt := m.IsEdns0(); opt != nil {
		q.datagram = max(q.datagram, int(opt.UDPSize()))
	}
	return q, nil
}

func (q *query) id() uint16 { return binary.BigEndian.Uint16(q.wire) }

// withID is the query's wire form with another identifier.
func (q *query) withID(id uint16) []byte {
	b := bytes.Clone(q.wire)
	binary.BigEndian.PutUint16(b, id)
	return b
}

// answeredBy says whether b is an answer to the query that was sent with id (RFC 5452 section 9.1).
func (q *query) answeredBy(b []byte, id uint16) bool {
	if len(b) < headerSize || binary.BigEndian.Uint16(b) != id || b[2]&0x80 == 0 {
		return false
	}
	if binary.BigEndian.Uint16(b[4:]) == 0 {
		return rcode(b) != dns.RcodeSuccess // servers that cannot read a question do not repeat it
	}
	if len(b) < q.end {
		return false
	}
	name := q.end - questionEnd
	return bytes.EqualFold(b[headerSize:name], q.wire[headerSize:name]) && bytes.Equal(b[name:q.end], q.wire[name:q.end])
}

func rcode(b []byte) int      { return int(b[3] & 15) }
func truncated(b []byte) bool { return b[2]&2 != 0 }

// refusal is an answer without records: the header and the question, with rc as response code.
func (q *query) refusal(rc int) []byte {
	b := bytes.Clone(q.wire[:q.end])
	b[2] = b[2]&0x79 | 0x80 // QR; opcode and RD stay, AA and TC do not
	b[3] = 0x80 | byte(rc)  // RA
	binary.BigEndian.PutUint16(b[4:], 1)
	clear(b[6:headerSize])
	return b
}

// fit cuts an answer to size bytes, with the TC bit that makes the container ask again over TCP.
func (q *query) fit(answer []byte, size int) []byte {
	if len(answer) <= size {
		return answer
	}
	var m dns.Msg
	if err := m.Unpack(answer); err == nil {
		m.Truncate(size)
		m.Truncated = true
		if b, err := m.Pack(); err == nil && len(b) <= size {
			return b
		}
	}
	b := q.refusal(rcode(answer))
	b[2] |= 2
	return b
}
