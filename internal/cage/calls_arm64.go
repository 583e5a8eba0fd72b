// The calls that have other names on arm64.

package cage

var archCalls = []string{"fstatat"}
