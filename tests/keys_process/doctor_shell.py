"""Runs `elastickv` commands on a node's data directory, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tests.cluster.cluster import NodeProcess

BOUND_BY_MODES = (("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
                  if os.geteuid() == 0 else ())
"""The mode bits of files hold for root, too (capabilities(7))."""


def elastickv(*arguments: str, timeout_s: float = 60, launcher: Sequence[str] = (),
              variables: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, with `variables` in its environment. `launcher` is
    the command line that starts it: a preexec_fn would run gRPC's fork handlers in the child, which
    may write to its stderr."""
    done = subprocess.run([*launcher, sys.executable, "-m", "elastickv", *arguments],
                          capture_output=True, text=True, timeout=timeout_s, check=False,
                          env={**os.environ, **(variables or {})})
    return done.returncode, done.stdout, done.stderr


def doctor(arguments: Sequence[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and verdicts by guard name."""
    code, out, errors = elastickv("doctor", *arguments, "--output", "json")
    assert errors == "", errors
    document = json.loads(out)
    assert document["may_start"] is (code == 0)
    return code, {row["guard"]: row for row in document["guards"]}


def refused_start(node: NodeProcess, arguments: Sequence[str] | None = None,
                  timeout_s: float = 60) -> tuple[int, str]:
    """Exit code and stderr of a node that is expected to end by itself."""
    code, _, errors = elastickv("node", *(arguments or node.arguments), timeout_s=timeout_s)
    return code, errors
