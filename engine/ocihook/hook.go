// This file does what a stage asks for.

package ocihook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/rootless-ovl/rootless-ovl/api"
)

const (
	// attachTime and detachTime bound a stage. They are shorter than Timeout: an engine that ends the hook says less about it.
	attachTime = 20 * time.Second
	detachTime = 10 * time.Second
	// patience is how long a hook waits for a daemon that is being restarted, or has no lease yet: engines do not start a container
	// again whose hook has failed, whatever its restart policy.
	patience = 5 * time.Second
	// pause is how long it waits before it asks again.
	pause = 100 * time.Millisecond
)

// API is what the hook asks of the daemon; *api.Client has it.
type API interface {
	Attach(context.Context, api.AttachRequest) (api.Attachment, error)
	Detach(ctx context.Context, nameOrPID, owner string) error
	DetachSoon(ctx context.Context, nameOrPID, owner string) error
	Attachments(context.Context) ([]api.Attachment, error)
	AttachmentsOf(ctx context.Context, owner string) ([]api.Attachment, error)
}

// Hook is one run of the hook.
type Hook struct {
	api      API
	stderr   io.Writer
	proc     string // where proc(5) is mounted
	parent   int    // the process that runs the hook
	patience time.Duration

	hostResolvConf string   // path
	storageConf    []string // paths of podman's storage.conf, for all users
}

// New makes a Hook that asks that daemon, and writes what a person may want to know to stderr.
func New(daemon API, stderr io.Writer) *Hook {
	return &Hook{api: daemon, stderr: stderr, proc: "/proc", parent: os.Getppid(), patience: patience, hostResolvConf: resolvConf,
		storageConf: []string{"/etc/containers/storage.conf", "/usr/share/containers/storage.conf"}}
}

// Run serves the stage that the state on stdin is of. An error of an attach is told to the engine, too.
func (h *Hook) Run(ctx context.Context, stdin io.Reader) error {
	s, err := ReadState(stdin)
	if err != nil {
		return err
	}
	switch s.Status {
	case statusCreating, statusCreated:
		ctx, cancel := context.WithTimeout(ctx, attachTime)
		defer cancel()
		err := h.attach(ctx, s)
		if err == nil {
			return nil
		}
		if terr := h.tellEngine(err); terr != nil {
			fmt.Fprintf(h.stderr, "rootless-ovl: the engine is not told: %v\n", terr)
		}
		return err
	case statusRunning:
		ctx, cancel := context.WithTimeout(ctx, detachTime)
		defer cancel()
		if err := h.started(ctx, s); err != nil { // not an error of the stage, for which a runtime would end the container
			fmt.Fprintf(h.stderr, "rootless-ovl: container %s: %v\n", short(s.ID), err)
		}
		return nil
	case statusStopped:
		ctx, cancel := context.WithTimeout(ctx, detachTime)
		defer cancel()
		return h.detach(ctx, s)
	}
	return api.Errorf(api.CodeInvalid, "container %s is %q: run this hook at the stages createRuntime, poststart and poststop only", short(s.ID), clip(s.Status))
}

// attach puts the container on the overlay.
func (h *Hook) attach(ctx context.Context, s State) error {
	w, err := readWish(s.Annotations, s.ID)
	if err != nil || w.leave {
		return err
	}
	if s.PID == 0 {
		return api.Errorf(api.CodeInvalid, "the state of container %s has no pid: run this hook at createRuntime, not before the runtime has made its namespaces", short(s.ID))
	}
	c, err := readBundle(s.Bundle)
	if err != nil {
		return err
	}
	if w.asked {
		if err := h.refuseImageAnnotations(s, c); err != nil {
			return err
		}
	}
	inode, err := h.netnsOf(fmt.Sprint(s.PID))
	if err != nil {
		return err
	}
	host, err := h.netnsOf("self")
	switch {
	case err != nil:
		return err
	case inode == host && w.asked:
		return api.Errorf(api.CodeInvalid, "container %s is in the host's own network, which it has with others (--network host): start it with --network none, or without the annotations %s*", short(s.ID), Prefix)
	case inode == host:
		return nil // among every container there are such ones
	}

	var list []api.Attachment
	err = h.ask(ctx, func() (err error) {
		list, err = h.api.Attachments(ctx)
		return err
	})
	if err != nil {
		return err
	}
	switch att, is := inNamespace(list, inode); {
	case is && att.Owner != Owner(s.ID) && w.asked && s.podIsUnnamed(att):
		// The pod's own container, which has no annotations, was one of every container. The first member that asks for something decides.
		if err := h.api.Detach(ctx, att.Name, att.Owner); err != nil && !errors.Is(err, api.ErrNotFound) {
			return err
		}
	case is && att.Owner != Owner(s.ID):
		return h.join(c, w, att)
	case is && att.PID == s.PID: // runc before 1.3 runs poststart right after createRuntime, and calls the container the same
		return h.resolve(c, w, att)
	}
	att, err := h.attachNew(ctx, s, c, w, inode, list)
	if errors.Is(err, api.ErrInUse) && c.holder() != 0 { // another member of the pod may have been first
		list, lerr := h.api.Attachments(ctx)
		if first, is := inNamespace(list, inode); lerr == nil && is {
			return h.join(c, w, first)
		}
	}
	if err != nil {
		return inAnnotations(fmt.Errorf("container %s: %w", short(s.ID), err))
	}
	for _, text := range append(att.Warnings, att.Problem) {
		if text != "" {
			fmt.Fprintf(h.stderr, "rootless-ovl: container %s: %s\n", short(s.ID), text)
		}
	}
	if err := h.resolve(c, w, att); err != nil {
		// The container is not started, and has no poststop then.
		return errors.Join(err, h.api.Detach(context.WithoutCancel(ctx), att.Name, att.Owner))
	}
	return nil
}

// attachNew attaches the container's namespace, which has that inode and is not attached.
func (h *Hook) attachNew(ctx context.Context, s State, c bundle, w wish, inode uint64, list []api.Attachment) (api.Attachment, error) {
	r := w.request
	r.PID, r.Owner = s.PID, Owner(s.ID)
	if holder := c.holder(); holder != 0 && h.isIn(holder, inode) {
		// The namespace is there before and after this container, with whose end it must not go: the holder's end ends it.
		r.PID, r.Owner = holder, s.podOwner()
	}
	beside := c.engineMakesNetwork()
	if !beside {
		var err error
		if beside, err = h.hasNetwork(s.PID); err != nil {
			return api.Attachment{}, err
		}
	}
	if beside && r.IfName == "" {
		r.IfName = besideInterface
	}
	r.NoDefaultRoute = beside
	if w.noDefaultRoute != nil {
		r.NoDefaultRoute = *w.noDefaultRoute
	}
	for _, old := range list {
		// The container, or the pod, is created anew, so what is left of an earlier life of it is no longer anybody's.
		if old.Owner != "" && old.Owner == r.Owner {
			if err := h.api.Detach(ctx, old.Name, old.Owner); err != nil && !errors.Is(err, api.ErrNotFound) {
				return api.Attachment{}, err
			}
		}
	}
	var att api.Attachment
	err := h.ask(ctx, func() (err error) {
		att, err = h.api.Attach(ctx, r)
		return err
	})
	return att, err
}

// join is for a container in a namespace that is attached already: it gets what its own file system has of the network. What it asks for beside
// that must be there.
func (h *Hook) join(c bundle, w wish, att api.Attachment) error {
	if lacks := w.beyond(att); lacks != "" {
		return api.Errorf(api.CodeInvalid, "the container shares a network that is on the overlay as %q, without %s: give every container of the pod the same annotations, or these to the container whose network it is", att.Name, lacks)
	}
	return h.resolve(c, w, att)
}

// beyond is what w asks for by name and att has not; "" where there is nothing.
func (w wish) beyond(att api.Attachment) string {
	called := func(name string) bool {
		return strings.EqualFold(name, att.Name) || slices.ContainsFunc(att.Aliases, func(a string) bool { return strings.EqualFold(a, name) })
	}
	r := w.request
	if w.named && !called(r.Name) {
		return "the name " + r.Name
	}
	for _, a := range r.Aliases {
		if !called(a) {
			return "the alias " + a
		}
	}
	if addr, _, _ := strings.Cut(att.Addr, "/"); r.Addr != "" && r.Addr != addr {
		return "the address " + r.Addr
	}
	for _, spec := range r.Publish {
		wanted, _ := api.ParsePublish(spec) // which has been read before
		for _, p := range wanted {
			same := func(q api.Port) bool {
				return q.Port == p.Port && q.Proto == p.Proto && q.HostAddr == p.HostAddr && (p.HostPort == 0 || q.HostPort == p.HostPort)
			}
			if !slices.ContainsFunc(att.Ports, same) {
				return "the published port " + spec
			}
		}
	}
	return ""
}

// resolve writes the container's resolv.conf, unless it is to be kept or there is none to write.
func (h *Hook) resolve(c bundle, w wish, att api.Attachment) error {
	if w.keepDNS || att.DNS == nil {
		return nil
	}
	err := h.writeResolvConf(c, *att.DNS)
	if err != nil && !w.asked {
		// Among every container there may be one whose root cannot be written; the network is worth having without names.
		fmt.Fprintf(h.stderr, "rootless-ovl: %v\n", err)
		return nil
	}
	return err
}

// started writes the engine's resolv.conf again, which podman may write after createRuntime where the container has a network of podman's.
func (h *Hook) started(ctx context.Context, s State) error {
	w, err := readWish(s.Annotations, s.ID)
	if err != nil || w.leave || w.keepDNS {
		return err
	}
	c, err := readBundle(s.Bundle)
	if err != nil {
		return err
	}
	if m, mounted := c.overResolvConf(); !mounted || !isEngines(m.Source) {
		return nil
	}
	inode, err := h.netnsOf(fmt.Sprint(s.PID))
	if err != nil {
		return err
	}
	list, err := h.api.Attachments(ctx)
	if err != nil {
		return err
	}
	if att, is := inNamespace(list, inode); is {
		return h.resolve(c, w, att)
	}
	return nil
}

// detach takes what the container owns off the overlay.
func (h *Hook) detach(ctx context.Context, s State) error {
	list, err := h.api.AttachmentsOf(ctx, Owner(s.ID))
	for _, att := range list {
		// podman waits for its hook, and the container is gone.
		if derr := h.api.DetachSoon(ctx, att.Name, att.Owner); derr != nil && !errors.Is(derr, api.ErrNotFound) {
			err = errors.Join(err, derr)
		}
	}
	if errors.Is(err, api.ErrUnavailable) {
		// The container has ended, which a daemon sees by itself, now or when it starts. An engine that removes a container must not fail.
		fmt.Fprintf(h.stderr, "rootless-ovl: container %s is not detached by its hook: %v; its address is free when the daemon runs\n", short(s.ID), err)
		return nil
	}
	return err
}

// ask asks until the daemon is there and ready, as long as that is worth while.
func (h *Hook) ask(ctx context.Context, question func() error) error {
	for until := time.Now().Add(h.patience); ; {
		err := question()
		if !errors.Is(err, api.ErrUnavailable) || time.Now().After(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// inAnnotations says of an error of the daemon's, whose remedies are flags of the command line, what they are here.
func inAnnotations(err error) error {
	words := []string{"name"}
	for key := range options {
		words = append(words, strings.TrimPrefix(key, Prefix))
	}
	for flag := range strings.FieldsFuncSeq(err.Error(), func(r rune) bool { return r != '-' && (r < 'a' || r > 'z') }) {
		word, is := strings.CutPrefix(flag, "--")
		if !is || !slices.Contains(words, word) {
			continue
		}
		if word == "name" {
			word = "attach"
		}
		return fmt.Errorf("%w (here %s is the annotation %s%s)", err, flag, Prefix, word)
	}
	return err
}

func inNamespace(list []api.Attachment, inode uint64) (api.Attachment, bool) {
	i := slices.IndexFunc(list, func(a api.Attachment) bool { return a.Inode == inode })
	if i < 0 {
		return api.Attachment{}, false
	}
	return list[i], true
}
