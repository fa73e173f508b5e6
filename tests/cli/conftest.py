"""A node for the client and admin commands, and a shell to run them in."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "server"))

from cli_shell import Done, Shell  # noqa: E402
from memory_node import MemoryNode, in_thread  # noqa: E402

from elastickv.cli.main import run  # noqa: E402


@pytest.fixture
def memory_node() -> Iterator[MemoryNode]:
    with in_thread(MemoryNode()) as node:
        yield node


@pytest.fixture
def shell(memory_node: MemoryNode, monkeypatch: pytest.MonkeyPatch,
          capsysbinary: pytest.CaptureFixture[bytes]) -> Shell:
    """`shell("client", "get", "key", stdin=b"")` against `memory_node`."""
    monkeypatch.setenv("ELASTICKV_ENDPOINTS", memory_node.address)
    monkeypatch.setenv("ELASTICKV_INSECURE", "1")

    def call(*arguments: str, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = run(list(arguments))
        captured = capsysbinary.readouterr()
        return Done(code, captured.out, captured.err.decode())

    return call
