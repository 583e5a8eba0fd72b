#!/bin/bash
# The GitHub action's first part: gets the program, lets it make user namespaces if asked, starts a node and waits until it is ready.
# Inputs are INPUT_..., as action.yml has them. Later steps find the program on PATH, and the node by the environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$RUNNER_TEMP/rootless-ovl
program=$work/bin/rootless-ovl
mkdir -p "$work/bin"

# fail says why, in one line as the runner reads it: it takes %25, %0D and %0A for what they stand for.
fail() {
	local text=$*
	text=${text//'%'/%25}
	text=${text//$'\r'/%0D}
	text=${text//$'\n'/%0A}
	echo "::error title=rootless-ovl::$text"
	exit 1
}

# The program, always at the same place, by which AppArmor knows it, and beside it the one that container engines start.
if [ -n "$INPUT_PROGRAM" ]; then
	install -m 0755 "$INPUT_PROGRAM" "$program"
	plugin=$(dirname "$(readlink -f "$INPUT_PROGRAM")")/rootless-ovl-plugin
	[ ! -e "$plugin" ] || install -m 0755 "$plugin" "$program-plugin"
elif [ -n "$INPUT_VERSION" ]; then
	case $(uname -m) in
	x86_64) arch=amd64 ;;
	aarch64) arch=arm64 ;;
	*) fail "there is no release for $(uname -m): leave out the input version, and it is built" ;;
	esac
	from=$GITHUB_SERVER_URL/${GITHUB_ACTION_REPOSITORY:-rootless-ovl/rootless-ovl}/releases/download/$INPUT_VERSION
	for each in "$program" "$program-plugin"; do
		name=${each##*/}-linux-$arch
		(
			cd "$work"
			curl --fail --fail-early --silent --show-error --location --retry 3 -O "$from/$name" -O "$from/SHA256SUMS"
			grep " $name\$" SHA256SUMS | sha256sum --check --quiet -
		) || fail "$from has no $name that its SHA256SUMS knows: look at the input version"
		install -m 0755 "$work/$name" "$each"
	done
else
	command -v go >/dev/null || fail "there is no Go to build with: put actions/setup-go before this step, or give the input version or program"
	(cd "$root" && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o "$work/bin/" ./cmd/...)
fi

# What keeps it from making user namespaces. What is changed is noted for down.sh.
restricted=kernel.apparmor_restrict_unprivileged_userns
if [ "$(cat "/proc/sys/${restricted//.//}" 2>/dev/null || echo 0)" = 1 ]; then
	case $INPUT_APPARMOR in
	profile)
		profile=${program//\//.}
		profile=/etc/apparmor.d/${profile#.}
		sudo tee "$profile" >/dev/null <<-END
			abi <abi/4.0>,
			include <tunables/global>

			profile ${profile##*/} "$program" flags=(unconfined) {
			  userns,
			}
		END
		echo "$profile" >"$work/profile"
		sudo apparmor_parser -r "$profile"
		;;
	sysctl)
		touch "$work/sysctl"
		sudo sysctl -q -w "$restricted=0"
		;;
	none)
		echo "::notice title=rootless-ovl::$restricted is 1 on this runner: \`rootless-ovl run\` will fail, unless the input apparmor is profile or sysctl"
		;;
	*) fail "the input apparmor is \"$INPUT_APPARMOR\": use profile, sysctl or none" ;;
	esac
fi

export ROOTLESS_OVL_RUNTIME_DIR=$work/run ROOTLESS_OVL_STATE_DIR=$work/state
flags=(--ephemeral --port "$INPUT_PORT")
if [ -n "$INPUT_ETCD_ENDPOINTS" ]; then
	flags+=(--etcd-endpoints "$INPUT_ETCD_ENDPOINTS")
else
	flags+=(--listen-etcd "$INPUT_LISTEN_ETCD")
fi
[ -z "$INPUT_ETCD_CAFILE" ] || flags+=(--etcd-cafile "$INPUT_ETCD_CAFILE")
[ -z "$INPUT_ETCD_CERTFILE" ] || flags+=(--etcd-certfile "$INPUT_ETCD_CERTFILE")
[ -z "$INPUT_ETCD_KEYFILE" ] || flags+=(--etcd-keyfile "$INPUT_ETCD_KEYFILE")
[ -z "$INPUT_ETCD_USERNAME" ] || flags+=(--etcd-username "$INPUT_ETCD_USERNAME")
[ -z "$INPUT_ETCD_PASSWORD" ] || export ROOTLESS_OVL_ETCD_PASSWORD=$INPUT_ETCD_PASSWORD # not a flag: ps shows those
set -f
# shellcheck disable=SC2206 # it is to be split
flags+=($INPUT_ARGS)
set +f

"$program" up "${flags[@]}" </dev/null >"$work/up.log" 2>&1 &
daemon=$!
"$program" status --wait "$INPUT_WAIT" >"$work/status" 2>"$work/why" &
waiting=$!
# Whichever ends first: a daemon that ends has said why.
if ! wait -n "$daemon" "$waiting" || ! kill -0 "$daemon" 2>/dev/null; then
	kill "$daemon" "$waiting" 2>/dev/null || true
	wait || true
	echo "::group::the log of rootless-ovl up"
	cat "$work/up.log"
	echo "::endgroup::"
	why=$(cat "$work/why")
	fail "the node did not become ready: ${why:-$(tail -n 1 "$work/up.log")}"
fi
cat "$work/status"

{
	echo "ROOTLESS_OVL_RUNTIME_DIR=$ROOTLESS_OVL_RUNTIME_DIR"
	echo "ROOTLESS_OVL_STATE_DIR=$ROOTLESS_OVL_STATE_DIR"
} >>"$GITHUB_ENV"
echo "$work/bin" >>"$GITHUB_PATH"
awk '$1 == "Subnet" && $2 != "file" { print "subnet=" $2 } $1 == "Gateway" { print "gateway=" $2 }' "$work/status" >>"$GITHUB_OUTPUT"
