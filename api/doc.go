// Package api is the daemon's face to everybody who is not the daemon: HTTP and JSON on a unix socket. It holds the types
// (with their stable snake_case JSON names), a Client for them, the Handler that puts them in front of a Backend (node.Node,
// or a fake in a test), and the Listener that makes the socket safe to own.
//
// Place in the journey: none of a packet's. The command line and the engine clients speak to a node through this room only;
// no address or routing logic lives here. What is checked here is what can be checked without knowing the node: the shape of a
// request.
//
// Ownership: values are plain data and belong to whoever holds them. A Client and a Listener may be used from many goroutines.
// Nothing here starts a goroutine except net/http inside Serve, which ends with Serve.
//
// Limits: a request body is at most MaxBody bytes, an answer at most MaxAnswer; unknown members of a request are refused, so a
// misspelt option is an error and not a surprise. Unknown members of an answer are ignored, so that an older client can speak
// to a newer daemon.
//
// Sources: unix(7) for SO_PEERCRED and the 108 bytes of sun_path; the XDG base directory specification for the default
// directories.
package api
