"""What is committed works on a machine that nobody has used before."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # git refuses a checkout of another user, as a container may see it, unless it is named.
    output = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments, "-z"],
        check=True, capture_output=True, text=True).stdout
    return output.split("\0")[:-1]


def test_no_link_is_committed() -> None:
    """A link that leads out of the checkout works on the machine of its author alone."""
    entries = git("ls-files", "--stage")
    assert entries
    assert [entry for entry in entries if entry.startswith("120000 ")] == []


def test_nothing_is_committed_that_is_made() -> None:
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []
