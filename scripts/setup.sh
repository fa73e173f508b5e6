#!/usr/bin/env bash
# Make .venv ready. Usage: scripts/setup.sh run|dev
#
# Everything is pinned with hashes in requirements*.lock. Nothing is fetched that is not in there:
# the project and source distributions are built with the locked build tools, without isolation.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-dev}
case "$profile" in
  run) lock=requirements.lock ;;
  dev) lock=requirements-dev.lock ;;
  *) echo "usage: $0 run|dev" >&2; exit 2 ;;
esac

say() { printf '%s\n' "setup: $*" >&2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "Python 3.11 was not found. Install it, or name it: make PYTHON=/path/to/python3.11"
  return 1
}

# Debian splits ensurepip from the interpreter.
ensure_venv_module() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null && return
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "installing python3.11-venv"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3.11-venv >&2
  else
    say "this Python has no venv module. Install it: sudo apt-get install python3.11-venv"
    return 1
  fi
}

# An interrupted first run can leave an environment without pip.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  ensure_venv_module "$python"
  say "creating .venv with $("$python" -V)"
  "$python" -m venv --clear .venv
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet --no-input "$@"; }

# The build tools come first, because a source distribution is built with them.
say "installing $lock"
pip install --no-deps --require-hashes -r requirements-build.lock
pip install --no-deps --require-hashes --no-build-isolation -r "$lock"
pip install --no-deps --no-build-isolation --no-index --editable .
say "done"
