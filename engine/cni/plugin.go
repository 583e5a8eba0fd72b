// This file is one call: its environment, its input, which command it is, and how it ends.

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	// latest is the version of the specification that is spoken where the caller's is not known.
	latest = "1.1.0"
	// patience bounds a call. An attach takes milliseconds, and some seconds where the store is away.
	patience = 45 * time.Second
	// maxInput bounds the configuration in bytes. It may hold the list of every container of the host.
	maxInput = 16 << 20
)

// spoken are the versions of the specification, in order.
var spoken = []string{"0.3.1", "0.4.0", "1.0.0", latest}

// API is what of the daemon a call needs. An *api.Client is one.
type API interface {
	Status(ctx context.Context) (api.Status, error)
	Attach(ctx context.Context, r api.AttachRequest) (api.Attachment, error)
	Attachments(ctx context.Context) ([]api.Attachment, error)
	AttachmentsOf(ctx context.Context, owner string) ([]api.Attachment, error)
	Detach(ctx context.Context, nameOrPID, owner string) error
}

// Plugin is one call of the plugin. All exported fields are needed.
type Plugin struct {
	Connect        func() (API, error) // called at most once, and not for VERSION
	Getenv         func(string) string
	Stdin          io.Reader
	Stdout, Stderr io.Writer // Stdout is the protocol's, Stderr is for people

	open func(path string) (*namespace, error) // openNamespace, or a fake in tests
}

// call is what the runtime has given, as far as every command needs it.
type call struct {
	Plugin
	command     string
	containerID string
	netns       string
	ifName      string
	input       []byte
	head        head
	daemon      API    // nil for VERSION
	made        string // the attachment that ADD has made
}

// head is what of the configuration every command reads.
type head struct {
	CNIVersion string          `json:"cniVersion"`
	Name       string          `json:"name"`
	PrevResult json.RawMessage `json:"prevResult"`
	// The second is what the first was called by runtimes with an early libcni 1.1.
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
	Attachments      json.RawMessage `json:"cni.dev/attachments"`
}

// command is one of CNI_COMMAND.
type command struct {
	since string   // the version of the specification that brought it
	needs []string // variables of the environment that must be there
	do    func(*call, context.Context) (output any, err error)
}

var commands = map[string]command{
	"ADD":    {"0.3.1", []string{envContainerID, envNetns, envIfName}, (*call).add},
	"CHECK":  {"0.4.0", []string{envContainerID, envNetns, envIfName}, (*call).check},
	"DEL":    {"0.3.1", []string{envContainerID, envIfName}, (*call).del},
	"GC":     {"1.1.0", nil, (*call).gc},
	"STATUS": {"1.1.0", nil, (*call).status},
}

// The environment.
const (
	envCommand     = "CNI_COMMAND"
	envContainerID = "CNI_CONTAINERID"
	envNetns       = "CNI_NETNS"
	envIfName      = "CNI_IFNAME"
	envArgs        = "CNI_ARGS"
)

// Run does what is asked and reports whether it was done. If not, the error stands on Stdout as the specification wants it.
func (p Plugin) Run(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c := &call{Plugin: p}
	if c.open == nil {
		c.open = openNamespace
	}
	output, err := c.run(ctx)
	if err == nil && output != nil {
		if err = c.print(output); err != nil {
			c.undo()
			err = fail(types.ErrIOFailure, "the result could not be written to standard output: %v", err)
		}
	}
	if err == nil {
		return true
	}
	e := asError(err)
	e.CNIVersion = latest
	if slices.Contains(spoken, c.head.CNIVersion) {
		e.CNIVersion = c.head.CNIVersion
	}
	_ = c.print(e) // where nobody reads standard output, the exit status alone tells
	return false
}

// print writes one JSON document to standard output.
func (c *call) print(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = c.Stdout.Write(append(b, '\n'))
	return err
}

// tell says something to people that is no error. Most runtimes log it.
func (c *call) tell(format string, args ...any) {
	fmt.Fprintf(c.Stderr, "rootless-ovl: "+format+"\n", args...)
}

func (c *call) run(ctx context.Context) (output any, err error) {
	c.command = c.Getenv(envCommand)
	if c.command == "" {
		return nil, fail(types.ErrInvalidEnvironmentVariables, "%s is not set: this is a CNI plugin, which a container runtime runs and people do not", envCommand)
	}
	b, err := io.ReadAll(io.LimitReader(c.Stdin, maxInput+1))
	switch {
	case err != nil:
		return nil, fail(types.ErrIOFailure, "the configuration could not be read from standard input: %v", err)
	case len(b) > maxInput:
		return nil, fail(types.ErrIOFailure, "the configuration on standard input is longer than %d bytes", maxInput)
	}
	c.input = b
	if c.command == "VERSION" {
		return c.version()
	}
	cmd, known := commands[c.command]
	if !known {
		return nil, fail(types.ErrInvalidEnvironmentVariables, "%s=%.40q is not known: it is ADD, DEL, CHECK, GC, STATUS or VERSION", envCommand, c.command)
	}
	if err := c.readHead(cmd.since); err != nil {
		return nil, err
	}
	if err := c.readEnv(cmd.needs); err != nil {
		return nil, err
	}
	if c.daemon, err = c.Connect(); err != nil {
		return nil, fail(types.ErrInvalidEnvironmentVariables, "%v", err)
	}
	return cmd.do(c, ctx)
}

// readHead reads what of the configuration every command needs.
func (c *call) readHead(since string) error {
	if err := json.Unmarshal(c.input, &c.head); err != nil {
		return fail(types.ErrDecodingFailure, "the configuration on standard input cannot be read: %v", err)
	}
	v := c.head.CNIVersion
	if !slices.Contains(spoken, v) {
		return fail(types.ErrIncompatibleCNIVersion, "cniVersion %.40q is not spoken: write one of %s in the network's configuration", v, strings.Join(spoken, ", "))
	}
	if slices.Index(spoken, v) < slices.Index(spoken, since) {
		return fail(types.ErrIncompatibleCNIVersion, "cniVersion %s does not have %s: write %s or later in the network's configuration", v, c.command, since)
	}
	if err := utils.ValidateNetworkName(c.head.Name); err != nil {
		return fail(types.ErrInvalidNetworkConfig, "the network's name %.80q: use letters, digits, '_', '.' and '-', beginning with a letter or digit", c.head.Name)
	}
	return nil
}

// readEnv reads the variables that tell which container is meant.
func (c *call) readEnv(needs []string) error {
	var missing []string
	for _, name := range needs {
		if c.Getenv(name) == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return fail(types.ErrInvalidEnvironmentVariables, "%s needs %s in the environment", c.command, strings.Join(missing, ", "))
	}
	c.containerID, c.netns, c.ifName = c.Getenv(envContainerID), c.Getenv(envNetns), c.Getenv(envIfName)
	if slices.Contains(needs, envContainerID) && utils.ValidateContainerID(c.containerID) != nil {
		return fail(types.ErrInvalidEnvironmentVariables, "%s=%.80q: use letters, digits, '_', '.' and '-', beginning with a letter or digit", envContainerID, c.containerID)
	}
	if slices.Contains(needs, envIfName) {
		if err := api.CheckIfName(c.ifName); err != nil {
			return fail(types.ErrInvalidEnvironmentVariables, "%s: %v", envIfName, err)
		}
	}
	return nil
}

// ownerPrefix begins the owners of a network's attachments.
func (c *call) ownerPrefix() string { return "cni/" + c.head.Name + "/" }

// owner is what the daemon knows this call's attachment by. None of its parts has a slash in it.
func (c *call) owner() string { return c.ownerPrefix() + c.containerID + "/" + c.ifName }

// maxOwner is how long an owner may be, in bytes.
const maxOwner = 255

// version answers VERSION, whatever the input is.
func (c *call) version() (any, error) {
	var input struct {
		CNIVersion string `json:"cniVersion"`
	}
	_ = json.Unmarshal(c.input, &input) // older runtimes send nothing
	if input.CNIVersion == "" {
		input.CNIVersion = version.Current()
	}
	return struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{input.CNIVersion, spoken}, nil
}

// Error codes of this plugin, beside those of the specification.
const (
	codeInUse     uint = 100 // a name, address, port or namespace is taken
	codeExhausted uint = 101 // no free address
	codeDenied    uint = 102 // another user's namespace or daemon, a privileged port
	codeBroken    uint = 103 // CHECK has found something else than ADD made
	codeDaemon    uint = 104 // a fault of the daemon or of the host

	codeNotReady uint = 50 // STATUS: ADD would fail
	codeLimited  uint = 51 // STATUS: and containers that are there may not reach each other
)

// callError is an error in the specification's words.
type callError struct {
	CNIVersion string `json:"cniVersion"`
	Code       uint   `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details,omitempty"`
}

func (e *callError) Error() string { return e.Msg }

func fail(code uint, format string, args ...any) *callError {
	return &callError{Code: code, Msg: fmt.Sprintf(format, args...)}
}

// asError gives an error of the daemon its number.
func asError(err error) *callError {
	var e *callError
	if errors.As(err, &e) {
		return e
	}
	code := codeDaemon
	switch {
	case errors.Is(err, api.ErrInvalid):
		code = types.ErrInvalidNetworkConfig
	case errors.Is(err, api.ErrNotFound):
		code = types.ErrUnknownContainer
	case errors.Is(err, api.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		code = types.ErrTryAgainLater
	case errors.Is(err, api.ErrInUse):
		code = codeInUse
	case errors.Is(err, api.ErrExhausted):
		code = codeExhausted
	case errors.Is(err, api.ErrDenied):
		code = codeDenied
	}
	return fail(code, "%v", err)
}
