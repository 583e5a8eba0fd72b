// Package dockerlink puts the socket of the docker plugin where a rootless dockerd looks for it.
//
// Place in the journey: `rootless-ovl up` runs Keep beside the node. dockerd looks for sockets of plugins in /run/docker/plugins and nowhere else, and
// under RootlessKit that is in a file system in memory, of RootlessKit's mount namespace, which is new each time RootlessKit is started. Its user may
// write there through /proc/PID/root. Versions of docker that read specifications of the user's (~/.local/lib/docker/plugins, made by
// `rootless-ovl install docker`) would do without.
//
// Keep looks once a second for a dockerd of this user, by the file that dockerd writes its pid to before it reads its networks, and by RootlessKit's
// state directory. dockerd repeats its search for a plugin for 15 seconds, so that a second late is early enough: containers that are started with
// dockerd find the plugin. Nothing is made before dockerd itself runs: its start script removes /run/docker, and fails on a directory.
//
// Keep is a loop of its caller's goroutine. A link that leads to the socket of another node that is there is left alone.
//
// Limits: dockerd with a --pidfile of its own and RootlessKit with a --state-dir other than $XDG_RUNTIME_DIR/dockerd-rootless together are not found.
//
// Sources: moby pkg/plugins/discovery.go and plugins.go (loadWithRetry), moby contrib/dockerd-rootless.sh, rootlesskit pkg/copyup.
package dockerlink
