// This file runs the suite on the store in memory.

package leasetest_test

import (
	"testing"

	"github.com/rootless-ovl/rootless-ovl/lease"
	"github.com/rootless-ovl/rootless-ovl/lease/leasetest"
)

func TestStore_PassesTheSuite(t *testing.T) {
	leasetest.Run(t, func(*testing.T) leasetest.Lab {
		s := leasetest.NewStore()
		return leasetest.Lab{
			Dial:    func(*testing.T) lease.Store { return s },
			Stop:    func(*testing.T) { s.SetAway(lease.ErrUnreachable) },
			Start:   func(*testing.T) { s.SetAway(nil) },
			Compact: func(*testing.T) { s.Compact() },
			Wipe:    func(*testing.T) { s.Wipe() },
			Save: func(*testing.T) func(*testing.T) {
				restore := s.Save()
				return func(*testing.T) { restore() }
			},
		}
	})
}
