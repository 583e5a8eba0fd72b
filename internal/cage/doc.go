// Package cage shuts a process in: from Enter on it can do what the daemon needs to do, and no more, whatever code comes to run in it.
//
// Three things of the kernel's make the cage, none of which needs a privilege, and none of which can be undone or left by a child:
//
//	no_new_privs   no setuid program and no file capability gives anything
//	seccomp        calls.go lists the system calls that there are; the others fail with EPERM, or with ENOSYS where a program tries them first
//	               and knows another way
//	landlock       paths.go says which files can be read, which directories written; and, from ABI 6 on, no process outside can be sent a
//	               signal, and no abstract socket outside be connected to
//
// A call that is missing from the list fails and is told to the kernel's log (as audit type SECCOMP), it does not end the daemon: a host's network
// shall not go down with it.
//
// What landlock forbids beside files: a process in the cage may look into no process that is outside of it, so most of /proc/PID is closed:
// ns, fd, root, exe, environ. What the daemon must see there a second process sees for it, which is started before (package opener).
//
// The network is not restricted: containers reach through the daemon whatever its user reaches.
//
// The package starts no goroutine, and keeps nothing. Its word for users is "sandbox" (`up --sandbox`), as other programs have it; in the code a
// Sandbox is what `run` makes (nsutil).
//
// Limits: what is handed to the process as a descriptor is not restricted; nor are stat(2), chmod(2) and the like by landlock, which the kernel
// does not know to restrict yet. Landlock restricts truncation from ABI 3 on (Linux 6.2), ioctl of devices from 5 on (6.10).
//
// Sources: seccomp(2), landlock(7), prctl(2), Documentation/userspace-api/landlock.rst; the list of calls was made by watching the daemon with
// strace(1) under the whole of the integration tests, and of what Go's runtime does on its own.
package cage
