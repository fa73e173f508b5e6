#!/usr/bin/env bash
# Re-resolve the lock files from pyproject.toml. UPGRADE=1 takes the newest versions; without it the
# versions already locked are kept where they still fit.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
  .venv/bin/uv pip compile --quiet --generate-hashes --python-version 3.11 --no-header \
    ${UPGRADE:+--upgrade} "$@"
}

compile pyproject.toml --group build -o requirements.lock
# The other two agree with the first on every shared version.
compile --group pyproject.toml:build -c requirements.lock -o requirements-build.lock
compile pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock

if grep -nE '^(--|[a-z0-9-]+ @ )|://' requirements*.lock; then
  echo "lock: a lock file names an index, an option or a URL" >&2
  exit 1
fi
