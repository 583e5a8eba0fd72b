// Package nettest has what tests of the packet path share: packets built field by field, a checker and a segmenter that know
// nothing of the code under test, a device and a next hop that remember what they were sent, and a pcap file of it when a
// test fails.
//
// Place in the journey: none; only tests import it. Its sums and its cutting are written as plainly as the RFCs put them,
// so that they agree with the packet path for no other reason than that both are right.
//
// Ownership: what a fake keeps is a copy. A Device has an eventfd, closed by the test's cleanup; nothing starts a goroutine.
package nettest
