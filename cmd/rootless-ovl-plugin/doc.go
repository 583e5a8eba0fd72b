// Command rootless-ovl-plugin is what container engines start, at each start and end of a container; people do not. It speaks the protocol of one
// kind of engine, to which standard input, standard output and the exit status belong, and asks the daemon (package api).
//
// It is a program of its own because it is on the way of every container: rootless-ovl holds etcd and gVisor, whose packages alone take
// several times as long to get ready as all that is done here. So it imports api and engine/ and nothing else of ours, and no library for command
// lines; TestPluginStaysThin holds that.
//
// Exit status: 0 done, 1 failed, 2 the command line is wrong. An error is one line on standard error, beside what the protocol has for it.
package main
