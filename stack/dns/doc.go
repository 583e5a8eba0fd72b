// Package dns answers containers' queries at the gateway address: those for the names of the overlay by itself, others by asking the
// resolvers of the host.
//
// Place in the journey: package stack gives it the datagrams and connections that containers send to port 53 of the gateway, and the zone
// that package node makes of everybody's attachments. The host's resolvers are asked with sockets of the host, so that a stub on its loopback
// (systemd-resolved, dnsmasq) works, too.
//
// A query for another name is read to see that it is one, and passed on byte for byte but for its identifier: EDNS options pass. An
// answer that a datagram could not hold is asked for again over TCP. Answers are kept for as long as their records allow, and the same question
// of several at one time is asked once. Servers are asked in the order of resolv.conf; one that has been silent is asked last for
// a while. Changes of resolv.conf are noticed by looking at the file, at most once a second: no inotify, whose instances run out.
//
// Goroutines: none of its own. Answer and ServeStream work in the caller's; ServeStream has one for every query of its connection that is being
// answered, 64 at most, and returns when they have ended. Limits: Config.MaxQueries bounds the queries that wait for a server, of which a container
// may have half, each with a buffer of 64 KiB and a socket; the cache has 4096 answers or 4 MiB.
//
// Sources: RFC 1035, RFC 2308 (what a denial may be kept), RFC 5452 (what an answer must match), RFC 6891 (EDNS), RFC 7766 (TCP),
// RFC 8020 (what NXDOMAIN means), resolv.conf(5).
package dns
