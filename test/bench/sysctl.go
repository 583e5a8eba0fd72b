// This file reads and writes sysctls, and puts back those of the machine.

package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// readSysctl reads one of the calling thread's network namespace; name is the path below /proc/sys.
func readSysctl(name string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return "", fmt.Errorf("sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", name, value, err)
	}
	return nil
}

// savedSysctls are values to put back.
type savedSysctls []struct{ name, value string }

func keepSysctls(names ...string) (savedSysctls, error) {
	var s savedSysctls
	for _, name := range names {
		value, err := readSysctl(name)
		if err != nil {
			return nil, err
		}
		s = append(s, struct{ name, value string }{name, value})
	}
	return s, nil
}

func (s savedSysctls) restore() error {
	var errs []error
	for _, v := range s {
		if now, err := readSysctl(v.name); err == nil && now == v.value {
			continue
		}
		errs = append(errs, writeSysctl(v.name, v.value))
	}
	return errors.Join(errs...)
}

// allowCubic lets network namespaces choose cubic: the kernel refuses them what the machine does not allow everybody.
func allowCubic() error {
	allowed, err := readSysctl(sysctlAllowedCC)
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(allowed), "cubic") {
		return nil
	}
	return writeSysctl(sysctlAllowedCC, allowed+" cubic")
}
