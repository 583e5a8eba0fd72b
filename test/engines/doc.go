// Package engines holds rootless-ovl against real container engines, rootless docker and podman, on simulated hosts (test/lab). It is run
// by `make engines`, as root: an engine maps ranges of uids, for which its user needs setuid programs that the lab without root
// cannot have. Every daemon and container is the unprivileged user's all the same.
//
// Place in the journey: beside it, as test/. Nothing but what a user would type is used: the engines' commands, and ours.
//
// Limits: no registry is asked; the one image is a busybox. The engines are those of the distribution (Debian: docker.io, rootlesskit,
// podman) and what they need.
package engines
