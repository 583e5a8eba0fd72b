// Package proxy lets host processes reach the overlay through one TCP port that speaks SOCKS5 (RFC 1928) and is an HTTP proxy (RFC 9110 and
// 9112: CONNECT and requests in absolute form). The first byte of a connection tells the two apart.
//
// Place in the journey: none of a container's packet. The proxy gets a function that dials; where that leads, and what it refuses, is
// node's to say. The proxy knows no address of the overlay and resolves no name.
//
// Goroutines: New starts none. Serve runs until its context ends, with one or two goroutines a connection; all have ended when it returns.
//
// Limits: Config.MaxConns connections of clients at a time; one more is closed at once and counted. A client has HandshakeTimeout to say what
// it wants, and the dialling DialTimeout. Of SOCKS there is CONNECT without authentication; BIND and UDP ASSOCIATE are answered "command
// not supported". A request in absolute form has the scheme http; https comes as CONNECT.
//
// Sources: RFC 1928; SOCKS4's answer from its description by Y.-D. Lee, 1992.
package proxy
