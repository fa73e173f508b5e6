"""elastickv.descriptors: clients never get the last ones."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from elastickv import descriptors


@pytest.mark.parametrize(("limit", "connections"), [
    pytest.param(64, 32, id="few"),
    pytest.param(512, 256, id="twice the reserve"),
    pytest.param(1024, 768, id="a usual soft limit"),
    pytest.param(10_256, 10_000, id="as many as are ever taken"),
    pytest.param(1 << 20, 10_000, id="a usual hard limit"),
    pytest.param(resource.RLIM_INFINITY, 10_000, id="no limit"),
])
def test_what_clients_may_hold(limit: int, connections: int) -> None:
    assert descriptors.for_clients(limit) == connections


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    program = ("import resource\n"
               "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))\n"
               "from elastickv import descriptors\n"
               "print(descriptors.raise_limit(), descriptors.limit(), descriptors.raise_limit())\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True, timeout=60)
    assert done.stdout.split() == ["128", "128", "128"]
