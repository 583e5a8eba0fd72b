// Package leasetest is for tests of whatever uses package lease: Store is etcd in memory, and Run is the one suite
// that says what a store must do and what a registry must do on it. Store passes it, and so do the embedded etcd and
// Debian's, which is why a test may trust Store.
//
// Store starts a goroutine for each watch, which ends with the watch's context, and a timer for each etcd lease. It
// reads Go's clock, so it works inside a testing/synctest bubble.
package leasetest
