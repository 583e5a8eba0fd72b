// The node's sockets and users that are not its own: root, whom no mode of a file keeps out.

package engines

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/test/lab"
)

func TestSockets_AnswerTheirOwnUserOnly(t *testing.T) {
	curl := program(t, "curl", "curl")
	l := lab.New(t, 1)
	h := l.Host(1)
	d := h.Up()
	for socket, ask := range map[string][]string{
		"api.sock":    {"http://rootless-ovl/v1/status"},
		"docker.sock": {"--request", "POST", "http://rootless-ovl/Plugin.Activate"},
	} {
		argv := append([]string{curl, "--silent", "--show-error", "--max-time", "10", "--unix-socket", filepath.Join(d.RuntimeDir, socket)}, ask...)
		lab.Eventually(t, socket+" answers its own user", func() bool { r := h.Run(argv[0], argv[1:]...); return r.Code == 0 && strings.HasPrefix(r.Stdout, "{") })
		// The directory keeps others out; root may connect, and is left without an answer: curl says that it was not, or got none.
		for _, uid := range []uint32{0, 4711} {
			cmd := exec.Command(argv[0], argv[1:]...)
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			out, err := cmd.CombinedOutput()
			if err == nil || !slices.Contains([]int{7, 52, 56}, cmd.ProcessState.ExitCode()) {
				t.Errorf("%s: curl of uid %d: %v: %s", socket, uid, err, out)
			}
		}
	}
}
