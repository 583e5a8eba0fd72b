// Command rootless-ovl is the command line: it turns flags into a node.Config or a request to the daemon, and answers into
// tables or JSON. There is one file a command and no logic of the overlay in any of them.
//
// `up` is the daemon; `run` starts a process in a namespace of its own; all others are short-lived clients of the daemon's
// API (package api), except `doctor`, which looks at the host, and `config` with --etcd-endpoints, which speaks to the store.
//
// Exit status: 0 done, 1 failed, 2 the command line is wrong; `run` passes on the status of its command. An error is one line
// on standard error; with --output json it is also a JSON object on standard output.
package main
