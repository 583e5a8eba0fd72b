// Tests of whose annotations count.

package ocihook

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

func TestHook_DoesNotAskTheImage(t *testing.T) {
	const image = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	for name, tt := range map[string]struct {
		manifest    string
		annotations string
		refused     bool
		attached    int
	}{
		"the image's":             {`{"annotations": {"run.rootless-ovl.host-access": "22"}}`, `{"run.rootless-ovl.host-access": "22"}`, true, 0},
		"the user's":              {`{"annotations": {"org.example": "x"}}`, `{"run.rootless-ovl.attach": "web", "org.example": "x"}`, false, 1},
		"other than the image's":  {`{"annotations": {"run.rootless-ovl.attach": "evil"}}`, `{"run.rootless-ovl.attach": "web"}`, false, 1},
		"one of both":             {`{"annotations": {"run.rootless-ovl.egress": "allow"}}`, `{"run.rootless-ovl.attach": "web", "run.rootless-ovl.egress": "allow"}`, true, 0},
		"the user does not want":  {`{"annotations": {"run.rootless-ovl.publish": "22:22"}}`, `{"run.rootless-ovl.attach": "false", "run.rootless-ovl.publish": "22:22"}`, false, 0},
		"no manifest":             {"", `{"run.rootless-ovl.attach": "web"}`, false, 1},
		"a manifest that is none": {"x", `{"run.rootless-ovl.attach": "web"}`, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			s.write("vfs-containers/containers.json", fmt.Sprintf(`[{"id": %q, "image": "x"}, {"id": %q, "image": %q}]`, containerB, containerA, image))
			if tt.manifest != "" {
				s.write("vfs-images/"+image+"/manifest", tt.manifest)
			}
			bundle := filepath.Dir(s.write("vfs-containers/"+containerA+"/userdata/config.json", `{"root": {"path": "rootfs"}, "linux": {"namespaces": [{"type": "network"}]}}`))
			s.write("vfs-containers/"+containerA+"/userdata/rootfs/x", "")
			state := fmt.Sprintf(`{"id": %q, "status": "created", "pid": %d, "bundle": %q, "annotations": %s}`, containerA, pidA, bundle, tt.annotations)
			err := s.hook.Run(t.Context(), bytes.NewReader([]byte(state)))
			if (err != nil) != tt.refused || len(s.daemon.attached) != tt.attached {
				t.Errorf("%v, attached %+v", err, s.daemon.attached)
			}
			if err != nil && errors.Is(err, api.ErrDenied) && !strings.Contains(err.Error(), "run.rootless-ovl.attach=false") {
				t.Errorf("%v does not say what to do", err)
			}
		})
	}
}
