// This file keeps images from asking for themselves.
//
// podman gives a container the annotations of its image's manifest beside the user's, and the state does not tell them apart. Whoever made an image
// could so leave the isolation of --network none, or open a port of the host's loopback. So the manifest is looked up in podman's store, beside
// which the bundle lies, and an annotation that is the image's word for word is refused. An image of another store (additional ones,
// imagestore) is not found, and not looked at.

package ocihook

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// maxStoreFile bounds what is read of the store's lists and manifests; in bytes.
const maxStoreFile = 64 << 20

// refuseImageAnnotations refuses annotations of ours that are the image's. Engines without this store do not hand images' annotations on.
func refuseImageAnnotations(s State) error {
	of, err := imageAnnotations(s.Bundle, s.ID)
	if err != nil {
		return fmt.Errorf("the annotations of the container's image, which must not be taken for yours: %w", err)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Annotations)) {
		if value, has := of[key]; has && strings.HasPrefix(key, Prefix) && value == s.Annotations[key] {
			return api.Errorf(api.CodeDenied, "annotation %s=%s is the image's, and an image is not asked: start the container with --annotation %s=false, or with other values of your own",
				key, clip(value), keyAttach)
		}
	}
	return nil
}

// imageAnnotations are those of the manifest of a container's image; nil where there is no image in this store.
func imageAnnotations(bundle, id string) (map[string]string, error) {
	dir, found := strings.CutSuffix(filepath.Clean(bundle), "/userdata") // STORE/DRIVER-containers/ID/userdata
	containersDir := filepath.Dir(dir)
	driver, named := strings.CutSuffix(filepath.Base(containersDir), "-containers")
	if !found || !named || !isStoreID(filepath.Base(dir)) {
		return nil, nil
	}
	for _, list := range []string{"containers.json", "volatile-containers.json"} {
		var containers []struct {
			ID    string `json:"id"`
			Image string `json:"image"`
		}
		if err := readJSON(filepath.Join(containersDir, list), &containers); err != nil {
			return nil, err
		}
		for _, c := range containers {
			if c.ID != id || !isStoreID(c.Image) {
				continue
			}
			var manifest struct {
				Annotations map[string]string `json:"annotations"`
			}
			err := readJSON(filepath.Join(filepath.Dir(containersDir), driver+"-images", c.Image, "manifest"), &manifest)
			return manifest.Annotations, err
		}
	}
	return nil, nil
}

// readJSON reads a file of the store; one that is not there leaves v as it is.
func readJSON(name string, v any) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, maxStoreFile)).Decode(v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
