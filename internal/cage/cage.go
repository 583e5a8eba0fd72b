// This file is what a program calls: Enter, and what it reports.

package cage

import (
	"errors"
	"fmt"
	"runtime"

	seccomp "github.com/elastic/go-seccomp-bpf"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Mode says how much of a cage there is to be.
type Mode string

// The modes.
const (
	Auto Mode = "auto" // what the kernel has
	On   Mode = "on"   // all of it, or an error
	Off  Mode = "off"  // none
)

// Report is what Enter has done. A part that is off has its reason in Why, by its name: "seccomp", "landlock", "no_new_privs".
type Report struct {
	Seccomp    bool
	Landlock   int // the ABI that is used; 0: off
	NoNewPrivs bool
	Why        map[string]string
	// Left are paths that could be let in only in part, each with the reason.
	Left []string
}

// AskedOff is why a part is off with Off.
const AskedOff = "--sandbox=off"

// Enter shuts the whole process in, all of its threads and those to come. There is no way back, and calling it again makes the cage smaller.
// With On an error may leave a part of the cage in place: the process should end then.
func Enter(mode Mode, p Paths) (Report, error) {
	r := Report{Why: make(map[string]string)}
	if mode == Off {
		r.Why["seccomp"], r.Why["landlock"], r.Why["no_new_privs"] = AskedOff, AskedOff, AskedOff
		return r, nil
	}
	// In this order: seccomp's list does not have the calls of the others.
	var err error
	if r.Landlock, r.Left, err = restrictPaths(p); err != nil {
		r.Why["landlock"] = err.Error()
	}
	if err := restrictCalls(); err != nil {
		r.Why["seccomp"] = err.Error()
	} else {
		r.Seccomp = true
	}
	if r.NoNewPrivs, err = noNewPrivs(); err != nil {
		r.Why["no_new_privs"] = err.Error()
	} else if !r.NoNewPrivs { // it comes with either
		r.Why["no_new_privs"] = "neither seccomp nor landlock is on"
	}
	if mode == On {
		for _, part := range []string{"no_new_privs", "seccomp", "landlock"} {
			if why := r.Why[part]; why != "" {
				return r, fmt.Errorf("--sandbox=on: %s: %s: with --sandbox=auto the daemon makes do with what there is", part, why)
			}
		}
	}
	return r, nil
}

// EnterOpener shuts in the process that looks into others in the daemon's place (package opener): no network, no child, nothing executed. It may
// not be in landlock's cage, from which nobody can look into others.
func EnterOpener() error { return load(openerCalls()) }

// restrictCalls loads the filter into all threads, with no_new_privs.
func restrictCalls() error { return load(daemonCalls()) }

func load(p seccomp.Policy) error {
	// no_new_privs is a thread's, and goes with the filter to the others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	filter := seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync | seccomp.FilterFlagLog, Policy: p}
	err := seccomp.LoadFilter(filter)
	if errors.Is(err, unix.EINVAL) { // Linux before 4.14 does not log
		filter.Flag = seccomp.FilterFlagTSync
		err = seccomp.LoadFilter(filter)
	}
	if err != nil {
		return fmt.Errorf("%w: does the kernel have CONFIG_SECCOMP_FILTER?", err)
	}
	return nil
}

func noNewPrivs() (bool, error) {
	is, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	return is == 1, err
}

// Kernel is what this kernel has for a cage.
type Kernel struct {
	Seccomp     bool
	Landlock    int   // ABI; 0: none
	LandlockErr error // why there is none
}

// OfKernel asks the kernel. It changes nothing.
func OfKernel() Kernel {
	k := Kernel{Seccomp: seccomp.Supported()}
	abi, err := llsys.LandlockGetABIVersion()
	if err != nil {
		k.LandlockErr = landlockOff(err)
		return k
	}
	k.Landlock = abi
	return k
}

func landlockOff(err error) error {
	switch {
	case errors.Is(err, unix.ENOSYS):
		return errors.New("the kernel has no Landlock (it came with Linux 5.13, CONFIG_SECURITY_LANDLOCK)")
	case errors.Is(err, unix.EOPNOTSUPP):
		return errors.New("Landlock was left out when the kernel started: add it to the list of lsm= on its command line")
	case errors.Is(err, unix.EPERM):
		return errors.New("the calls of Landlock are forbidden here, as some container engines do")
	}
	return fmt.Errorf("landlock: %w", err)
}
