// Package test holds the black-box tests: the rootless-ovl binary on simulated hosts, with no root and no capability.
//
// Each test makes a lab of its own (package lab), starts daemons, attaches containers and looks at what a user can see:
// packets, exit codes, output, files, counters. Nothing of the program's packages is imported. What containers reach beside the overlay is
// tried in gateway/.
package test
