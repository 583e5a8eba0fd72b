// Package ocihook is the hook of the OCI runtime specification that puts podman's containers on the overlay: at createRuntime it asks the
// daemon to attach the container's network namespace, at poststop to detach it. It is `rootless-ovl-plugin oci-hook`, which the engine runs
// anew for each stage, with the container's state on standard input.
//
// Place in the journey: none of a packet's. A thin client of the API: what to attach and under which names is read from the container's
// annotations (run.rootless-ovl.*) and from its bundle; addresses and routes are the daemon's. Beside that it writes the container's
// resolv.conf, for an engine gives a container without a network of its own (--network none) none.
//
// Whose network it is: a container whose namespace is another's (a pod's member, --network container:X) is not attached again: it finds
// the attachment by the namespace's inode, and attaches the process that holds the namespace where nobody has. One that is in the namespace of the
// host is refused. One that has a network of the engine's beside gets routes to the overlay alone.
//
// Errors: the container is not started, with a text that says what to do. runc hands it on from standard error; crun shows the exit
// code alone, so the text goes where the engine reads the runtime's errors (see runtimelog.go). poststop never fails for want of a
// daemon: the daemon sees the container's end by itself.
//
// Ownership: a Hook serves one container at one stage, in one goroutine, and starts none.
//
// Limits: a state of 4 MiB, a config.json of 16 MiB. Nothing is kept between stages: the daemon knows the attachment by its owner,
// "oci/" and the container's id.
//
// Sources: the OCI runtime specification 1.0.2 (runtime.md, config.md: state, POSIX-platform hooks); podman's hooks 1.0.0
// (oci-hooks(5)); libpod/oci_conmon_common.go for where podman reads a runtime's error.
package ocihook
