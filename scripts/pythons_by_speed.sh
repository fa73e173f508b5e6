#!/usr/bin/env bash
# Every Python 3.11 to 3.13 there is, the fastest first: "<nanoseconds> <version> <path>".
#
# How the interpreter was built decides a tenth to a seventh of a node's speed. The first one in PATH
# has a tenth's lead, so that equals are not told apart by noise.
set -euo pipefail
cd "$(dirname "$0")/.."

candidates() {
  type -ap python3.{11,12,13} python3 || true
  printf '%s\n' /usr/{,local/}bin/python3.{11,12,13}
}

handicap=100
seen=" "
while IFS= read -r candidate; do
  [ -x "$candidate" ] || continue
  real=$(readlink -f "$candidate")
  [[ "$seen" != *" $real "* ]] || continue
  seen="$seen$real "
  # Another version, or broken: it says nothing, or something else.
  read -r nanoseconds version \
    < <("$candidate" -I scripts/measure_python.py 2>/dev/null </dev/null) || continue
  [[ "$nanoseconds" =~ ^[0-9]{1,15}$ ]] || continue
  echo "$((nanoseconds * handicap / 100)) $version $candidate"
  handicap=110
done < <(candidates) | sort -n
