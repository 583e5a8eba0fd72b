#!/bin/bash
# The GitHub action's last part: stops the node, which gives its subnet back, and undoes what up.sh did with root's help. It runs also
# where up.sh got nowhere.
set -uo pipefail

work=$RUNNER_TEMP/rootless-ovl
if [ -x "$work/bin/rootless-ovl" ]; then
	"$work/bin/rootless-ovl" --runtime-dir "$work/run" down ||
		echo "::warning title=rootless-ovl::the node was not stopped in order: its subnet is free 30 seconds after its end"
fi
if [ -e "$work/up.log" ]; then
	echo "::group::the log of rootless-ovl up"
	cat "$work/up.log"
	echo "::endgroup::"
fi
if [ -e "$work/profile" ]; then
	sudo apparmor_parser -R "$(cat "$work/profile")"
	sudo rm -f "$(cat "$work/profile")"
fi
if [ -e "$work/sysctl" ]; then
	sudo sysctl -q -w kernel.apparmor_restrict_unprivileged_userns=1
fi
rm -rf "$work"
