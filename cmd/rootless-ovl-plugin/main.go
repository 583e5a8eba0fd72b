// The entry point, and the command line.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	exitFailed = 1
	exitUsage  = 2
)

// envRuntimeDir stands in for --runtime-dir, as with rootless-ovl.
const envRuntimeDir = "ROOTLESS_OVL_RUNTIME_DIR"

const usage = `Usage: rootless-ovl-plugin [--runtime-dir DIR] KIND

Container engines start this program, as the files say that "rootless-ovl install" makes for them.

KIND is the engine's protocol:
  cni                      CNI 1.1.0: what CNI_COMMAND says, the network's configuration on standard input
  netavark create|setup NETNS|teardown NETNS|info
                           netavark's plugin API 1.0.0, for podman's networks of the driver rootless-ovl
  oci-hook                 a hook of an OCI runtime at createRuntime, poststart and poststop: the container's state on standard input

--runtime-dir DIR is where the daemon's socket is (default $XDG_RUNTIME_DIR/rootless-ovl; env ` + envRuntimeDir + `).
--version, --help
`

// version is set by the linker in release builds (-X main.version=v1.2.3); otherwise the build information tells.
var version string

// call is one run of the program.
type call struct {
	runtimeDir     string // as given; client says which it is
	stdin          io.Reader
	stdout, stderr io.Writer
}

// kinds are the protocols.
var kinds = map[string]func(call, context.Context, []string) error{
	"cni":      call.cni,
	"netavark": call.netavark,
	"oci-hook": call.ociHook,
}

// usageError is a command line that cannot be right. Its text says what to do.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// errSaid ends the program as failed; what there was to say has been said in the protocol.
var errSaid = errors.New("failed")

func main() {
	c := call{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	os.Exit(c.execute(context.Background(), os.Args[1:]))
}

// execute runs one command line and returns its exit status.
func (c call) execute(ctx context.Context, args []string) int {
	err := c.run(ctx, args)
	if err == nil {
		return 0
	}
	if !errors.Is(err, errSaid) {
		// An error may hold what somebody sent; it must not become two lines.
		text := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
		fmt.Fprintf(c.stderr, "rootless-ovl-plugin: %s\n", text)
	}
	if errors.As(err, new(usageError)) {
		return exitUsage
	}
	return exitFailed
}

// run reads the flags, which stand before the kind: what follows it is the engine's.
func (c call) run(ctx context.Context, args []string) error {
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		flag, value, has := strings.Cut(args[0], "=")
		args = args[1:]
		switch flag {
		case "--runtime-dir":
			if !has && len(args) > 0 {
				value, args = args[0], args[1:]
			}
			if value == "" {
				return usagef("--runtime-dir is empty: give it a directory, or leave it out")
			}
			c.runtimeDir = value
		case "--version":
			_, err := fmt.Fprintf(c.stdout, "rootless-ovl-plugin %s\n", thisVersion())
			return err
		case "--help", "-h":
			_, err := io.WriteString(c.stdout, usage)
			return err
		default:
			return usagef("%s is no flag: see `rootless-ovl-plugin --help`", flag)
		}
	}
	if len(args) == 0 {
		return usagef("container engines start this program, and say what kind they are: see `rootless-ovl-plugin --help`")
	}
	kind, known := kinds[args[0]]
	if !known {
		return usagef("%q is no kind of engine: see `rootless-ovl-plugin --help`", args[0])
	}
	return kind(c, ctx, args[1:])
}

// client speaks to the daemon of this runtime directory.
func (c call) client() (*api.Client, error) {
	dir := cmp.Or(c.runtimeDir, os.Getenv(envRuntimeDir))
	var err error
	if dir == "" {
		dir, err = api.RuntimeDir()
	} else {
		dir, err = filepath.Abs(dir)
	}
	if err != nil {
		return nil, err
	}
	return api.NewClient(api.SocketPath(dir)), nil
}

func thisVersion() string {
	if bi, ok := debug.ReadBuildInfo(); ok && version == "" && bi.Main.Version != "(devel)" {
		return cmp.Or(bi.Main.Version, "devel")
	}
	return cmp.Or(version, "devel")
}
