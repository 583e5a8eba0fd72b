// This file makes an attachment's TAP where an earlier node has left one behind. A node that stops leaves its TAPs in their
// containers for the next one; if its attachments.json is lost then, nobody knows of them any more.

package node

import (
	"errors"

	"github.com/rootless-ovl/rootless-ovl/api"
	"github.com/rootless-ovl/rootless-ovl/nsutil"
)

// createTAP makes a TAP in ns. One of a node of ours that is in its way is replaced if nobody holds it.
func (n *Node) createTAP(ns namespace, c nsutil.TAPConfig, s savedAttachment) (link, error) {
	l, err := ns.create(c, s)
	if !errors.Is(err, nsutil.ErrIfNameTaken) && !errors.Is(err, nsutil.ErrRouteTaken) {
		return l, err
	}
	devices, werr := ns.inTheWay(c)
	if werr != nil {
		return nil, errors.Join(err, werr)
	}
	removed := false
	for _, d := range devices {
		if !ours(d, c) {
			continue
		}
		switch rerr := ns.remove(d.IfName); {
		case errors.Is(rerr, nsutil.ErrTAPBusy):
			return nil, api.Errorf(api.CodeInUse, "it is attached to another node of this host that is running (interface %s): `rootless-ovl detach` it there first, with the --runtime-dir of that node", d.IfName)
		case errors.Is(rerr, nsutil.ErrNoTAP): // a multi-queue one, or just gone
		case rerr != nil:
			return nil, errors.Join(err, rerr)
		default:
			removed = true
			n.log.Warn("replacing an interface that an earlier node left in the container", "name", s.Name, "where", s.where(), "ifname", d.IfName, "mac", macText(d.MAC))
		}
	}
	if !removed {
		return nil, err
	}
	return ns.create(c, s)
}

// ours tells a TAP of a node by its MAC: those that macOf makes, and the very one that was asked for.
func ours(d nsutil.Device, c nsutil.TAPConfig) bool {
	return d.MAC[0] == macPrefix[0] && d.MAC[1] == macPrefix[1] || d.MAC == c.MAC
}
