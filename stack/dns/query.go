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
	maxQuery    = 4096 // of a container's; a question with every option there is has some 400
	plainUDP    = 512  // what a datagram may hold when the query says nothing else
	questionEnd = 4    // QTYPE and QCLASS behind the name
)

var errMalformed = errors.New("dns: not a query")

// query is what the resolver knows of a container's message.
type query struct {
	wire     []byte // the message; its identifier is the container's
	end      int    // where the question section ends
	opcode   int
	question dns.Question
	datagram int // the largest datagram that the container takes as an answer, in bytes

	// alone: there is more in it than a question, so that the answer may be for this query alone.
	alone bool

	// Of EDNS (RFC 6891).
	edns    bool
	version uint8
	do      bool // DNSSEC records are wanted
	sizeAt  int  // where in wire the size of datagrams is; 0: nowhere, or it must not be changed
}

// parseQuery reads a container's message. It is the first to look at these bytes.
func parseQuery(b []byte) (query, error) {
	if len(b) < headerSize || len(b) > maxQuery {
		return query{}, errMalformed
	}
	var m dns.Msg
	if err := m.Unpack(b); err != nil || m.Response || len(m.Question) != 1 {
		return query{}, errMalformed
	}
	_, end, err := dns.UnpackDomainName(b, headerSize)
	if err != nil || end+questionEnd > len(b) || compressed(b[headerSize:]) {
		return query{}, errMalformed
	}
	q := query{wire: b, end: end + questionEnd, opcode: m.Opcode, question: m.Question[0], datagram: plainUDP}
	records := len(m.Answer) + len(m.Ns) + len(m.Extra)
	q.alone = records > 0
	if opt := m.IsEdns0(); opt != nil {
		q.datagram = max(q.datagram, int(opt.UDPSize()))
		q.edns, q.version, q.do = true, opt.Version(), opt.Do()
		// Only where it is the one record: others may be a signature of it all (TSIG).
		if records == 1 && b[q.end] == 0 { // [root 1][type 2][size 2]...
			q.alone = len(opt.Option) > 0
			q.sizeAt = q.end + 3
		}
	}
	return q, nil
}

// compressed tells whether a name that has been read before has a pointer in it. That of a question could lead into the header alone, and would be
// another name with another identifier.
func compressed(name []byte) bool {
	for name[0] != 0 && name[0]&0xc0 == 0 {
		name = name[1+name[0]:]
	}
	return name[0] != 0
}

// key is what queries have in common that one answer does for; none for a query that has to be asked by itself. The identifier, the case of
// letters and the size of datagrams are not in it.
func (q *query) key() (string, bool) {
	if q.opcode != dns.OpcodeQuery || q.alone || q.version != 0 {
		return "", false
	}
	name := q.wire[headerSize : q.end-questionEnd]
	for i := 0; i < len(name); i += 1 + int(name[i]) {
		if name[i] > 63 {
			return "", false // a pointer, which answers could not repeat
		}
	}
	key := make([]byte, 0, len(name)+questionEnd+2)
	for _, c := range name { // the lengths in between are below any letter
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		key = append(key, c)
	}
	key = append(key, q.wire[q.end-questionEnd:q.end]...)
	const rd, adAndCD = 0x01, 0x30
	flags := byte(0)
	if q.edns {
		flags |= 1
	}
	if q.do {
		flags |= 2
	}
	return string(append(key, q.wire[2]&rd|q.wire[3]&adAndCD, flags)), true
}

// readdressed is an answer to another query with the same key as the answer to this one. It is a copy.
func (q *query) readdressed(answer []byte) []byte {
	b := bytes.Clone(answer)
	binary.BigEndian.PutUint16(b, q.id())
	if binary.BigEndian.Uint16(b[4:]) > 0 {
		copy(b[headerSize:q.end], q.wire[headerSize:q.end]) // in this query's case of letters
	}
	return b
}

func (q *query) id() uint16 { return binary.BigEndian.Uint16(q.wire) }

// toServer is the query's wire form with another identifier, and the size of datagrams that the gateway takes, where it has EDNS: the container's
// matters when it gets the answer. It would tell apart what is one question: the more of them are on their way at once, the likelier one of a
// number of forged answers is taken (RFC 5452 section 5).
func (q *query) toServer(id uint16) []byte {
	b := bytes.Clone(q.wire)
	binary.BigEndian.PutUint16(b, id)
	if q.sizeAt > 0 {
		binary.BigEndian.PutUint16(b[q.sizeAt:], ednsSize)
	}
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

// ednsSize is how large a datagram the gateway takes (DNS flag day 2020).
const ednsSize = 1232

// refusal is an answer without records: the header and the question, with rc as response code, and EDNS where the query has it.
func (q *query) refusal(rc int) []byte {
	b := bytes.Clone(q.wire[:q.end])
	b[2] = b[2]&0x79 | 0x80 // QR; opcode and RD stay, AA and TC do not
	b[3] = 0x80 | byte(rc)  // RA
	binary.BigEndian.PutUint16(b[4:], 1)
	clear(b[6:headerSize])
	if q.edns {
		b[headerSize-1] = 1
		b = append(b, 0, 0, byte(dns.TypeOPT), ednsSize>>8, ednsSize&0xff, 0, 0, 0, 0, 0, 0) // the root; type; size; flags; no options
	}
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
