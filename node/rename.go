// This file gives an attachment that lives other names: docker and CNI tell a container's names after they have told of its interface, and docker
// may change them.

package node

import (
	"context"
	"slices"
	"strings"

	"github.com/rootless-ovl/rootless-ovl/api"
)

// Rename gives an attachment the names of r, and no others. On an error it has those that it had.
func (n *Node) Rename(ctx context.Context, nameOrPID string, r api.NamesRequest) (api.Attachment, error) {
	if err := r.Validate(); err != nil {
		return api.Attachment{}, err
	}
	a, err := n.beginNaming(ctx, nameOrPID)
	if err != nil {
		return api.Attachment{}, err
	}
	defer func() { <-a.naming }()
	n.mu.Lock()
	was := a.saved
	next := was
	next.Aliases = slices.Clone(r.Aliases)
	if r.Name != "" {
		next.Name, next.Named = r.Name, true
	}
	if err = checkNames(&next); err == nil {
		err = n.nameFreeLocked(a, next.Name)
	}
	if err != nil {
		n.mu.Unlock()
		return api.Attachment{}, err
	}
	a.next = next.Name
	n.mu.Unlock()

	err = n.swapNames(ctx, &was, &next)
	n.mu.Lock()
	defer n.mu.Unlock()
	a.next = ""
	if err != nil {
		return api.Attachment{}, err
	}
	if a.phase != live { // it has ended meanwhile
		n.mu.Unlock()
		n.dropNameOf(&next)
		n.mu.Lock()
		return api.Attachment{}, api.Errorf(api.CodeNotFound, "no attachment %q: `rootless-ovl ps` lists them", nameOrPID)
	}
	n.setNamesOfLocked(a, &next)
	if err := n.saveAttachmentsLocked(); err != nil {
		n.setNamesOfLocked(a, &was)
		n.mu.Unlock()
		back := n.swapNames(context.WithoutCancel(ctx), &next, &was)
		n.mu.Lock()
		if back != nil {
			n.log.Warn("a name was lost", "name", was.Name, "err", back)
		}
		return api.Attachment{}, err
	}
	a.nameErr = nil
	n.renameLocked()
	n.log.Info("renamed", "name", next.Name, "aliases", strings.Join(next.Aliases, " "), "before", was.Name, "addr", was.Addr.Addr())
	return n.describeLocked(a), nil
}

// beginNaming finds the attachment that is to get other names, and waits for those who are giving it some: of the store, which may be long in
// answering, and for this attachment alone. The caller takes the element of naming out again.
func (n *Node) beginNaming(ctx context.Context, nameOrPID string) (*attachment, error) {
	for {
		n.mu.Lock()
		a, err := n.liveLocked(nameOrPID)
		n.mu.Unlock()
		if err != nil {
			return nil, err
		}
		select {
		case a.naming <- struct{}{}:
		case <-ctx.Done():
			return nil, api.Errorf(api.CodeUnavailable, "attachment %q is being given other names (%w): try again", nameOrPID, context.Cause(ctx))
		}
		n.mu.Lock()
		now, err := n.liveLocked(nameOrPID)
		n.mu.Unlock()
		if err == nil && now == a {
			return a, nil
		}
		<-a.naming // the name is another's now, or nobody's
		if err != nil {
			return nil, err
		}
	}
}

// nameFreeLocked says which other attachment of this node has a name, or is getting it.
func (n *Node) nameFreeLocked(a *attachment, name string) error {
	for _, other := range n.attachments {
		if other != a && (strings.EqualFold(other.saved.Name, name) || strings.EqualFold(other.next, name)) {
			return api.Errorf(api.CodeInUse, "name %q is taken by %q, %s: choose another with --name", name, other.saved.Name, other.saved.where())
		}
	}
	return nil
}

// setNamesOfLocked has everybody on this node know a by the names of s.
func (n *Node) setNamesOfLocked(a *attachment, s *savedAttachment) {
	delete(n.attachments, a.saved.Name)
	a.saved.Name, a.saved.Named, a.saved.Aliases = s.Name, s.Named, s.Aliases
	n.attachments[s.Name] = a
	n.pool.taken[a.saved.Addr.Addr()] = s.Name
}

// swapNames has the store tell the names of to instead of those of from. Nobody finds neither of the two for longer than one answer of the store
// takes: the new ones are published first, unless the old ones are in their way.
func (n *Node) swapNames(ctx context.Context, from, to *savedAttachment) error {
	n.mu.Lock()
	old, had := n.nameOfLocked(from)
	name, wanted := n.nameOfLocked(to)
	names := n.names
	n.mu.Unlock()
	if names == nil {
		return nil // followNames publishes what there is by then
	}
	if had && wanted && old.Name != name.Name && (slices.Contains(old.Aliases, name.Name) || slices.Contains(name.Aliases, old.Name)) {
		n.dropNameOf(from)
		had = false
	}
	if wanted {
		if err := n.claim(ctx, name); err != nil {
			if prev, ok := n.publishedAs(from); ok { // what a claim of the same name has ended, or we have just dropped
				if kerr := names.Keep(prev); kerr != nil {
					n.log.Warn("a name is not published", "name", prev.Name, "err", kerr)
				}
			}
			return err
		}
	}
	if had && (!wanted || old.Name != name.Name) {
		n.dropNameOf(from)
	}
	return nil
}
