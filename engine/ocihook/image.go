// This file keeps images from asking for themselves.
//
// podman gives a container the annotations of its image's manifest beside the user's, and the state does not tell them apart. Whoever made an image
// could so leave the isolation of --network none, or open a port of the host's loopback. So the image's manifests are looked up in podman's store,
// beside which the bundle lies, and in the stores of images that storage.conf names, and an annotation that is the image's word for word is
// refused. All of its manifests count: a later pull of another one replaces what the store calls the manifest, not the container's annotations.
// Where no manifest is found nobody can tell whose the annotations are, and they are refused.

package ocihook

import (
	"encoding/base64"
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

	"github.com/BurntSushi/toml"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// maxStoreFile bounds what is read of the store's lists and manifests; in bytes.
const maxStoreFile = 64 << 20

// refuseImageAnnotations refuses annotations of ours that are the image's. Engines without this store do not hand images' annotations on.
func (h *Hook) refuseImageAnnotations(s State, c bundle) error {
	store, has := storeOf(s.Bundle)
	if !has {
		return nil
	}
	image, err := store.imageOf(s.ID, c)
	if err != nil {
		return fmt.Errorf("the image of container %s, whose annotations must not be taken for yours: %w", short(s.ID), err)
	}
	if image == noImage {
		return nil
	}
	manifests, err := store.manifests(image, h.storageConfs(s.Bundle))
	switch {
	case err != nil:
		return fmt.Errorf("the annotations of the container's image, which must not be taken for yours: %w", err)
	case len(manifests) == 0:
		return api.Errorf(api.CodeDenied, "container %s has annotations %s*, and no manifest of its image %q is found, in %s or in a store that storage.conf names, so they may be the image's, and an image is not asked: start the container with --annotation %s=false, pull the image into podman's own store, or name its store at additionalimagestores in storage.conf",
			short(s.ID), Prefix, clip(image), store.root, keyAttach)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Annotations)) {
		for _, m := range manifests {
			if value, has := m.Annotations[key]; has && strings.HasPrefix(key, Prefix) && value == s.Annotations[key] {
				return api.Errorf(api.CodeDenied, "annotation %s=%s is the image's, and an image is not asked: start the container with --annotation %s=false, or with other values of your own",
					key, clip(value), keyAttach)
			}
		}
	}
	return nil
}

// store is a containers/storage(7) store.
type store struct {
	root   string // directory
	driver string // begins the names of its directories
}

// noImage is the image of a container that is made of a directory.
const noImage = ""

// storeOf is the store in which the engine keeps the bundle: ROOT/DRIVER-containers/ID/userdata.
func storeOf(bundle string) (store, bool) {
	dir, found := strings.CutSuffix(filepath.Clean(bundle), "/userdata")
	containers := filepath.Dir(dir)
	driver, named := strings.CutSuffix(filepath.Base(containers), "-containers")
	return store{filepath.Dir(containers), driver}, found && named && isStoreID(filepath.Base(dir))
}

// imageOf is the image that a container has been made from. The lists of a transient store are in a directory which is not kept, from which the
// engine mounts files such as .containerenv into the container.
func (st store) imageOf(id string, c bundle) (string, error) {
	roots := []string{st.root}
	for _, m := range c.Mounts {
		if run, is := storeOf(filepath.Dir(m.Source)); is && run.driver == st.driver && !slices.Contains(roots, run.root) {
			roots = append(roots, run.root)
		}
	}
	for _, root := range roots {
		for _, list := range []string{"containers.json", "volatile-containers.json"} {
			var containers []struct {
				ID    string `json:"id"`
				Image string `json:"image"`
			}
			if err := readJSON(filepath.Join(root, st.driver+"-containers", list), &containers); err != nil {
				return "", err
			}
			for _, c := range containers {
				if c.ID == id {
					return c.Image, nil
				}
			}
		}
	}
	return "", api.Errorf(api.CodeDenied, "podman's list in %s does not have the container, and an image is not asked: start the container with --annotation %s=false, or in another store (podman info: graphRoot, transientStore)",
		filepath.Join(st.root, st.driver+"-containers"), keyAttach)
}

type manifest struct {
	Annotations map[string]string `json:"annotations"`
}

// manifests are all of an image that the store, and those of images that confs name, have: the last one pulled, and each by its digest.
func (st store) manifests(image string, confs []string) (list []manifest, err error) {
	if !isStoreID(image) {
		return nil, nil
	}
	for _, root := range append([]string{st.root}, imageStores(confs)...) {
		dir := filepath.Join(root, st.driver+"-images", image)
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) { // which podman cannot read, either
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !isManifest(e.Name()) {
				continue
			}
			var m manifest
			if err := readJSON(filepath.Join(dir, e.Name()), &m); err != nil {
				return nil, err
			}
			list = append(list, m)
		}
	}
	return list, nil
}

// isManifest tells whether a file of an image's is one: "manifest", or "=" and the base64 of "manifest-" and its digest.
func isManifest(name string) bool {
	encoded, is := strings.CutPrefix(name, "=")
	key, err := base64.StdEncoding.DecodeString(encoded)
	return name == "manifest" || is && err == nil && strings.HasPrefix(string(key), "manifest-")
}

// storageConfs are the files in which podman finds where its stores are. A hook's environment is empty as a rule, so the user's home is looked
// for above the bundle, too.
func (h *Hook) storageConfs(bundle string) []string {
	const inHome = ".config/containers/storage.conf"
	list := slices.Clone(h.storageConf)
	for dir := filepath.Dir(bundle); dir != "/"; dir = filepath.Dir(dir) {
		list = append(list, filepath.Join(dir, inHome))
	}
	if home := os.Getenv("HOME"); home != "" {
		list = append(list, filepath.Join(home, inHome))
	}
	return list
}

// imageStores are the directories of further stores of images. A file that is not there, or that podman cannot read, names none: an image
// which is in none of them is refused.
func imageStores(confs []string) []string {
	var list []string
	for _, name := range confs {
		var conf struct {
			Storage struct {
				ImageStore string `toml:"imagestore"`
				Options    struct {
					ImageStore string   `toml:"imagestore"`
					Additional []string `toml:"additionalimagestores"`
				} `toml:"options"`
			} `toml:"storage"`
		}
		if _, err := toml.Decode(readSome(name), &conf); err != nil {
			continue
		}
		for _, dir := range append(conf.Storage.Options.Additional, conf.Storage.Options.ImageStore, conf.Storage.ImageStore) {
			if filepath.IsAbs(dir) && !slices.Contains(list, dir) {
				list = append(list, dir)
			}
		}
	}
	return list
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
