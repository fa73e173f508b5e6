#!/bin/sh
# Install what the fault harness takes from Debian, where it is missing. Needs root.
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
if [ -z "$missing" ]; then
    echo "nothing is missing"
    exit 0
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
