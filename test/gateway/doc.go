// Gateway tries what a container reaches beside the overlay, case by case, and what reaches it: egress, published ports, names, closed and
// opened doors, and how it holds under load. The cases that slirp4netns and pasta could pass too are tried on them as well, and
// one table says who passes what. `make gateway` runs it.
//
// Place in the journey: beside it. The program under test is the binary that a user runs, on the simulated hosts of package lab;
// slirp4netns and pasta are Debian's, run by the same unprivileged user on hosts of the same kind.
//
// How it works. A case (trial.go) is a function that is given a site: a lab in which one system gives containers their network
// (site.go). Cases that need more than a fresh container make labs of their own. Each case ends in bounded time. What rootless-ovl
// does not pass makes the exit code non-zero; what the others do not pass is an entry in the table.
//
// Owners: a case owns what it starts, through its trial's clean-up; a site owns its lab.
//
// Limits: the cases look at behaviour, never at speed: that is test/bench. Waits have an end, far beyond what is needed.
//
// Sources: the man pages of slirp4netns(1) (its API socket) and pasta(1); ip(7), ipv6(7), udp(7) for path MTU and error queues.
package main
