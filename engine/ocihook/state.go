// This file reads the state of a container, as a runtime gives it to its hooks.

package ocihook

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// maxState bounds the state, which holds all of the container's annotations; in bytes.
const maxState = 4 << 20

// What State.Status may say. Runtimes differ in what they call a container at createRuntime.
const (
	statusCreating = "creating"
	statusCreated  = "created"
	statusRunning  = "running"
	statusStopped  = "stopped"
)

// State is what this hook needs of a container's state.
type State struct {
	ID          string            `json:"id"`
	Status      string            `json:"status"`
	PID         int               `json:"pid"`    // as the engine's namespace of processes, which is the host's, has it; 0 at poststop
	Bundle      string            `json:"bundle"` // directory of config.json, absolute
	Annotations map[string]string `json:"annotations"`
}

// maxID bounds an id, so that it fits into an owner; in bytes.
const maxID = 200

// isContainerID tells whether id is one that runc and crun accept. (Nothing here is a regular expression: every container
// would pay for its making.)
func isContainerID(id string) bool {
	for _, c := range []byte(id) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && c != '_' && c != '+' && c != '.' && c != '-' {
			return false
		}
	}
	return id != "" && len(id) <= maxID
}

// isStoreID tells whether s is an id that an engine makes for a container or an image: 64 hexadecimal digits.
func isStoreID(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == 64
}

// ReadState reads a state and checks what does not depend on the stage. Errors have api.CodeInvalid.
func ReadState(r io.Reader) (State, error) {
	var s State
	b, err := io.ReadAll(io.LimitReader(r, maxState+1))
	switch {
	case err != nil:
		return State{}, fmt.Errorf("the container's state on standard input: %w", err)
	case len(b) > maxState:
		return State{}, api.Errorf(api.CodeInvalid, "the container's state is larger than %d bytes: give it fewer or shorter annotations", maxState)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return State{}, api.Errorf(api.CodeInvalid, "standard input is not a container's state in JSON (%w): a container engine runs this program as a hook; `rootless-ovl attach` attaches by hand", err)
	}
	switch {
	case !isContainerID(s.ID):
		return State{}, api.Errorf(api.CodeInvalid, "the container's state has the id %q: a runtime gives 1 to %d letters, digits and _+.-", clip(s.ID), maxID)
	case s.PID < 0:
		return State{}, api.Errorf(api.CodeInvalid, "the state of container %s has the pid %d: a runtime gives one above 0, or none at poststop", s.ID, s.PID)
	case !filepath.IsAbs(s.Bundle):
		return State{}, api.Errorf(api.CodeInvalid, "the state of container %s has the bundle %q: a runtime gives an absolute path", s.ID, clip(s.Bundle))
	}
	return s, nil
}

// Owner is who owns the attachment of a container, in the words of the API.
func Owner(containerID string) string { return "oci/" + containerID }

// keySandbox is the annotation by which a pod's member names the container whose namespaces it shares.
const keySandbox = "io.kubernetes.cri-o.SandboxID"

// podOwner owns the attachment of a pod of which s is a member; "" where it is of none.
func (s State) podOwner() string {
	if id := s.Annotations[keySandbox]; isContainerID(id) {
		return Owner(id)
	}
	return ""
}

// podIsUnnamed tells whether att is of the pod of which s is a member, and named after the pod's own container.
func (s State) podIsUnnamed(att api.Attachment) bool {
	owner := s.podOwner()
	return owner != "" && att.Owner == owner && att.Name == nameOf(s.Annotations[keySandbox])
}

// clip shortens what somebody sent so that it fits in an error line.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return fmt.Sprintf("%s... (%d bytes)", s[:most], len(s))
}
