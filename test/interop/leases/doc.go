// Package leases holds package lease against flannel's pkg/subnet, pkg/lease and pkg/subnet/etcd: on the same input both say the
// same. Where they differ on purpose, the difference has a name in the test, and the test fails when it is not there any more.
//
// Nothing here needs a privilege; the crowd needs Debian's etcd-server.
package leases
