// Package dns answers containers' queries at the gateway address by asking the resolvers of the host.
//
// Place in the journey: package stack gives it the datagrams and connections that containers send to port 53 of the gateway. The host's
// resolvers are asked with sockets of the host, so that a stub on its loopback (systemd-resolved, dnsmasq) works, too.
//
// A query is read to see that it is one, and passed on byte for byte but for its identifier: EDNS options pass. An answer that a
// datagram could not hold is asked for again over TCP. Servers are asked in the order of resolv.conf; one that has been silent is asked last for
// a while. Changes of resolv.conf are noticed by looking at the file, at most once a second: no inotify, whose instances run out.
//
// Goroutines: none of its own. Answer and ServeStream work in the caller's. Memory: a buffer of 64 KiB for every query in flight;
// Config.MaxQueries bounds them.
//
// Sources: RFC 1035, RFC 5452 (what an answer must match), RFC 6891 (EDNS), RFC 7766 (TCP), resolv.conf(5).
package dns
