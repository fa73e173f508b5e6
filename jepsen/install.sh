#!/bin/sh
# Install what the fault harness takes from Debian, where it is missing. Needs root (or sudo) then.
#
#   iproute2      namespaces, veth pairs, tc
#   libfaketime   clock steps
#   fiu-utils     I/O errors
set -eu

missing=""
for package in iproute2 libfaketime fiu-utils; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q "ok installed" ||
        missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "install as root first:$missing" >&2; exit 1; }
    as_root="sudo"
fi
# An archive that does not answer is given up soon; the defaults wait for minutes.
apt_get() {
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::Retries=1 \
        -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15 -o DPkg::Lock::Timeout=30 "$@"
}
apt_get update
# shellcheck disable=SC2086
apt_get install --no-install-recommends $missing >/dev/null
