#!/usr/bin/env bash
# Installs what the benchmark compares with and drives it with, from Debian: etcd, h2load, nghttpd (to
# see how fast the generator is) and haproxy (mutual TLS in front of the generator).
# Does nothing where both are there already. Needs root (or sudo) otherwise.
set -euo pipefail

wanted=()
command -v etcd >/dev/null || wanted+=(etcd-server)
command -v etcdctl >/dev/null || wanted+=(etcd-client)
command -v h2load >/dev/null || wanted+=(nghttp2-client)
command -v nghttpd >/dev/null || wanted+=(nghttp2-server)
command -v haproxy >/dev/null || wanted+=(haproxy)
[ ${#wanted[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "install ${wanted[*]} as root first" >&2; exit 1; }
  as_root=(sudo)
fi

# Debian starts a freshly installed service; the benchmark starts its own members.
policy=/usr/sbin/policy-rc.d
made_policy=
if [ ! -e "$policy" ]; then
  made_policy=yes
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 755 "$policy"
fi
trap '[ -z "$made_policy" ] || "${as_root[@]}" rm -f "$policy"' EXIT

export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get -qq update
"${as_root[@]}" apt-get -qq install -y --no-install-recommends "${wanted[@]}" >/dev/null
