// The calls that have other names on amd64, and those from before *at(2).

package cage

var archCalls = []string{"newfstatat", "poll", "epoll_wait"}
