// Package install says which small files make podman, docker, CNI, netavark, systemd and the shell of one user know this program, and writes
// them and takes them back.
//
// Place in the journey: `rootless-ovl install`, `uninstall` and `doctor`, and nothing else. No daemon is needed. Setup says where things are,
// Setup.Install and Setup.Uninstall look at the home directory through an fs.FS and return a Plan without changing anything, Apply
// carries a Plan out. Nothing here starts a goroutine or a program.
//
// What is there already is never overwritten: a file is ours when the record in the state directory (record.go) has its path and the hash
// of what is in it. Everything else is the user's, and a Plan that would need to change it is refused with the remedy. What podman reads as lists is
// extended in a drop-in file of our own (podman.go).
//
// A Plan is carried out such that the record always has everything that was written: whatever interrupts it, Uninstall finds all of it (but for
// the state directory, if that was new).
//
// Limits: one installation a user; directories' times change when files come and go. What engines read at their start they must be started
// again for, which Plan.Notes says.
//
// Sources: oci-hooks(5), containers.conf(5) and containers/common pkg/config for the order in which podman reads; moby pkg/plugins
// discovery.go and discovery_unix.go; the CNI specification 1.1.0; netavark's plugin-API.md; systemd.unit(5), systemd.exec(5),
// systemd.service(5), systemd.socket(5).
package install
