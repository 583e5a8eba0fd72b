// Tests of whose annotations count.

package ocihook

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const image = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

func TestHook_DoesNotAskTheImage(t *testing.T) {
	for name, tt := range map[string]struct {
		manifest    string
		annotations string
		refused     bool
		attached    int
	}{
		"the image's":                  {`{"annotations": {"run.rootless-ovl.host-access": "22"}}`, `{"run.rootless-ovl.host-access": "22"}`, true, 0},
		"the user's":                   {`{"annotations": {"org.example": "x"}}`, `{"run.rootless-ovl.attach": "web", "org.example": "x"}`, false, 1},
		"other than the image's":       {`{"annotations": {"run.rootless-ovl.attach": "evil"}}`, `{"run.rootless-ovl.attach": "web"}`, false, 1},
		"one of both":                  {`{"annotations": {"run.rootless-ovl.egress": "allow"}}`, `{"run.rootless-ovl.attach": "web", "run.rootless-ovl.egress": "allow"}`, true, 0},
		"the user does not want":       {`{"annotations": {"run.rootless-ovl.publish": "22:22"}}`, `{"run.rootless-ovl.attach": "false", "run.rootless-ovl.publish": "22:22"}`, false, 0},
		"no manifest":                  {"", `{"run.rootless-ovl.attach": "web"}`, true, 0},
		"no manifest, not wanted":      {"", `{"run.rootless-ovl.attach": "false"}`, false, 0},
		"no manifest, nor a wish":      {"", `{"org.example": "x"}`, false, 1},
		"one that is none, nor a wish": {"x", `{"org.example": "x"}`, false, 1},
		"a manifest that is none":      {"x", `{"run.rootless-ovl.attach": "web"}`, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			s.lists("store", image)
			if tt.manifest != "" {
				s.write("store/vfs-images/"+image+"/manifest", tt.manifest)
			}
			err := s.fromStore(tt.annotations)
			if (err != nil) != tt.refused || len(s.daemon.attached) != tt.attached {
				t.Errorf("%v, attached %+v", err, s.daemon.attached)
			}
			if err != nil && errors.Is(err, api.ErrDenied) && !strings.Contains(err.Error(), "run.rootless-ovl.attach=false") {
				t.Errorf("%v does not say what to do", err)
			}
		})
	}
}

func TestHook_FindsTheImageWhereverItIs(t *testing.T) {
	const (
		greedy   = `{"annotations": {"run.rootless-ovl.host-access": "22"}}`
		harmless = `{"annotations": {"org.example": "x"}}`
		mine     = `{"run.rootless-ovl.attach": "web"}`
		its      = `{"run.rootless-ovl.host-access": "22"}`
		of       = "vfs-images/" + image + "/"
	)
	key := func(name string) string { return of + "=" + base64.StdEncoding.EncodeToString([]byte(name)) }
	byDigest := key("manifest-sha256:" + image)
	for name, tt := range map[string]struct {
		arrange     func(s *stage)
		annotations string
		refused     string // what the error says; "" for none
	}{
		"a manifest pulled before": {func(s *stage) {
			s.lists("store", image)
			s.write("store/"+of+"manifest", harmless)
			s.write("store/"+byDigest, greedy)
		}, its, "host-access=22 is the image's"},
		"what is no manifest": {func(s *stage) {
			s.lists("store", image)
			s.write("store/"+of+"manifest", harmless)
			s.write("store/"+key("sha256:"+image), greedy)
			s.write("store/"+of+"=x", "x")
		}, its, ""},
		"an additional store of the user's": {func(s *stage) {
			s.lists("store", image)
			s.write(".config/containers/storage.conf", fmt.Sprintf("[storage.options]\nadditionalimagestores = [%q]\n", filepath.Join(s.dir, "more")))
			s.write("more/"+of+"manifest", greedy)
		}, its, "is the image's"},
		"the user's annotation, an additional store of the host's": {func(s *stage) {
			s.lists("store", image)
			s.write("storage.conf", fmt.Sprintf("[storage.options]\nadditionalimagestores = [%q]\n", filepath.Join(s.dir, "more")))
			s.write("more/"+of+"manifest", greedy)
		}, mine, ""},
		"a store for images alone": {func(s *stage) {
			s.lists("store", image)
			s.write("storage.conf", fmt.Sprintf("[storage]\nimagestore = %q\n", filepath.Join(s.dir, "images")))
			s.write("images/"+byDigest, greedy)
		}, its, "is the image's"},
		"a store nobody names": {func(s *stage) {
			s.lists("store", image)
			s.write("storage.conf", "[storage")
			s.write("more/"+of+"manifest", greedy)
		}, mine, "additionalimagestores"},
		"a transient store's image": {func(s *stage) {
			s.lists("run", image)
			s.mounts(map[string]string{"/run/.containerenv": filepath.Join(s.dir, "run/vfs-containers", containerA, "userdata/.containerenv")})
			s.write("store/"+of+"manifest", greedy)
		}, its, "is the image's"},
		"the user's annotation, a transient store": {func(s *stage) {
			s.lists("run", image)
			s.mounts(map[string]string{"/run/.containerenv": filepath.Join(s.dir, "run/vfs-containers", containerA, "userdata/.containerenv")})
			s.write("store/"+of+"manifest", greedy)
		}, mine, ""},
		"no list has the container":      {func(*stage) {}, mine, "attach=false"},
		"a container of a directory":     {func(s *stage) { s.lists("store", "") }, mine, ""},
		"an image that has another's id": {func(s *stage) { s.lists("store", "../../x") }, mine, "attach=false"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			tt.arrange(s)
			err := s.fromStore(tt.annotations)
			if (err != nil) != (tt.refused != "") || err != nil && (!errors.Is(err, api.ErrDenied) || !strings.Contains(err.Error(), tt.refused)) {
				t.Errorf("error %v, want one that says %q", err, tt.refused)
			}
			if attached := len(s.daemon.attached) == 1; attached == (tt.refused != "") {
				t.Errorf("attached %+v", s.daemon.attached)
			}
		})
	}
}

// lists has the store in that directory say which image container A is made from.
func (s *stage) lists(store, image string) {
	s.t.Helper()
	s.write(store+"/vfs-containers/containers.json", fmt.Sprintf(`[{"id": %q, "image": "x"}, {"id": %q, "image": %q}]`, containerB, containerA, image))
}

// fromStore runs the hook for container A, of podman's store, at createRuntime.
func (s *stage) fromStore(annotations string) error {
	s.t.Helper()
	config, err := json.Marshal(s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	bundle := filepath.Dir(s.write("store/vfs-containers/"+containerA+"/userdata/config.json", string(config)))
	s.write("store/vfs-containers/"+containerA+"/userdata/rootfs/x", "")
	state := fmt.Sprintf(`{"id": %q, "status": "created", "pid": %d, "bundle": %q, "annotations": %s}`, containerA, pidA, bundle, annotations)
	return s.hook.Run(s.t.Context(), strings.NewReader(state))
}
