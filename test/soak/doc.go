// Command soak finds the next bug: three nodes on simulated hosts with a real etcd, on which random operations and random faults fall,
// and a model of what must hold, which is held against the nodes whenever they have had time to settle.
//
//	bin/soak -for 1h -seed 42
//
// A round is: faults begin (faults.go), operations happen (operations.go), the faults end, the nodes settle, and everything is checked
// (agree.go: what nodes and store say; reach.go: what containers reach, and what must not be reached). Now and then all
// containers go, and what the daemons hold is measured (leaks.go). At the first thing that does not hold, it prints the seed, the last
// operations and the states of all nodes, and ends with exit code 1.
//
// The seed and the number of the round decide which operations and faults come, and in which order; when packets and processes meet is the
// machine's affair. So a seed that failed comes back to the same days, and mostly to the same failure.
//
// What an operation that failed has done is not known where its daemon or the store was being hurt meanwhile: the attachment is *unsure*, and
// what the node says of it, once it has settled, becomes the model, which then has to hold. One that failed on a good day is a violation.
//
// Place in the journey: beside it. Goroutines: rounds are one goroutine; operations of one batch run beside each other, on a member each;
// servers of a container are the container's (member.go), and end with it.
//
// Limits: one kind of network a run, udp or vxlan, IPv4; the lab's users and hosts are namespaces of one machine.
package main
