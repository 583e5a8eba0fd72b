// Package handover is what two daemons say to each other when one takes the other's place: a description in JSON and the descriptors that it is of,
// over a unix socket (SCM_RIGHTS, unix(7)).
//
// Place in the journey: `up --replace`. node/handover.go says what is handed over, in which order, and what happens when something fails.
//
// It starts no goroutines. Descriptors that Receive returns are close-on-exec and the caller's; after an error of it none is left open.
//
// Limits: MaxDescriptors, MaxDescription. Both ends are of one user, which the kernel vouches for; all the same nothing that is read is believed
// before it is checked, for the other program may be of any version.
package handover
