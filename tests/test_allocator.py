"""The allocator keeps what was freed: taking it again costs no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ROUNDS = """
import resource, sys
from elastickv.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)

def faults_of_a_round():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes(64 << 10) for _ in range(512)]
    blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_round()
print(faults_of_a_round())
"""


def _faults_of_second_round(mode: str) -> int:
    result = subprocess.run([sys.executable, "-c", _ROUNDS, mode], capture_output=True, text=True,
                            timeout=60)
    if result.returncode == 3:
        pytest.skip("the allocator is not glibc's")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_freed_memory_is_taken_again_without_page_faults():
    assert _faults_of_second_round("leave") > 4000
    assert _faults_of_second_round("keep") < 1000
