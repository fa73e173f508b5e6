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

# Debian splits ensurepip from the interpreter.
ensure_venv_module() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null && return
  local real package
  real=$(readlink -f "$1")
  package=${real#/usr/bin/}-venv
  if [[ "$package" =~ ^python3\.[0-9]+-venv$ ]] && command -v apt-get >/dev/null; then
    if [ "$(id -u)" = 0 ]; then
      say "installing $package"
      export DEBIAN_FRONTEND=noninteractive
      timeout -k 5 300 bash -c "apt-get update -qq && apt-get install -y -qq $package" \
        >&2 </dev/null && return
    fi
    say "$1 has no venv module. Install it: sudo apt-get install $package"
  else
    say "$1 has no venv module"
  fi
  return 1
}

make_environment() {
  ensure_venv_module "$1" || return 1
  # A link that leads nowhere is in the way of venv, which does not follow or replace it.
  if [ -L .venv ] && [ ! -e .venv ]; then rm .venv; fi
  say "creating .venv with $1 ($("$1" -V))"
  "$1" -m venv --clear .venv </dev/null
}

create_environment() {
  local path
  if [ -n "${PYTHON:-}" ]; then
    if "$PYTHON" -I scripts/measure_python.py --check 2>/dev/null; then
      make_environment "$(command -v "$PYTHON")"
      return
    fi
    # Other tools read this variable, too.
    say "PYTHON=$PYTHON is no Python 3.11 to 3.13: looking for one"
  fi
  while read -r _ _ path; do
    make_environment "$path" && return
  done < <(scripts/pythons_by_speed.sh)
  say "no usable Python 3.11 to 3.13 was found. Install one, or name it:" \
    "make PYTHON=/path/to/python3.11"
  return 1
}

# An interrupted first run can leave an environment without pip.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  create_environment
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet --no-input "$@"; }

# The build tools come first, because a source distribution is built with them.
say "installing $lock"
pip install --no-deps --require-hashes -r requirements-build.lock
pip install --no-deps --require-hashes --no-build-isolation -r "$lock"
pip install --no-deps --no-build-isolation --no-index --editable .
say "done"
