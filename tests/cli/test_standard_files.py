"""Client and admin commands whose stdin, stdout or stderr cannot be used: what a write came to is
still told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from memory_node import MemoryNode, in_thread

from elastickv import certs
from elastickv.config import TlsFiles
from elastickv.errors import ExitCode, OutcomeUnknown

CHUNKS = "client batch put a 1 put b 2 put c 3 --chunk 1"


def run(node: MemoryNode, command: str, *, unbuffered: bool = False,
        encoding: str = "utf-8", stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """`elastickv COMMAND`, redirections included."""
    environment = {**os.environ, "ELASTICKV_ENDPOINTS": node.address, "ELASTICKV_INSECURE": "1",
                   "PYTHONUNBUFFERED": "1" if unbuffered else "", "PYTHONIOENCODING": encoding}
    return subprocess.run(["bash", "-c", f"{sys.executable} -m elastickv {command}"],
                          env=environment, stdin=subprocess.DEVNULL, stdout=stdout,
                          stderr=subprocess.PIPE, text=True, timeout=60, check=False)


@pytest.mark.parametrize("redirection", ["", "2>/dev/full", "2>&-"])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_the_exit_code_says_that_an_outcome_is_unknown(
        memory_node: MemoryNode, redirection: str, unbuffered: bool) -> None:
    memory_node.faults.errors.extend([None, OutcomeUnknown("the leader was lost")])
    done = run(memory_node, f"{CHUNKS} {redirection}", unbuffered=unbuffered)
    assert (done.returncode, done.stdout) == (ExitCode.OUTCOME_UNKNOWN, "")
    assert ("the first 1 operations were applied" in done.stderr) is (not redirection)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("command", [
    CHUNKS, "client put k v", "client scan", "client scan --limit 9999", "client get k --raw",
    "client get k --stale", "admin raft status"])
def test_what_needs_no_words_succeeds_without(memory_node: MemoryNode, command: str,
                                              redirection: str) -> None:
    run(memory_node, "client put k v")
    done = run(memory_node, f"{command} {redirection}")
    assert done.returncode == ExitCode.OK
    assert done.stderr in ("", "stale read: this member was known to have everything 0 ms ago\n")


CHANGES: dict[str, str] = {
    "client put k v": "the write was applied at index 1",
    "client put k v --output json": "the write was applied at index 1",
    "client delete k": "the write was applied at index 1",
    CHUNKS: "the write was applied at index 3",
    "admin encryption bootstrap": "the change was applied at index 1",
    "admin raft add-learner n2 127.0.0.1:2": "the change was applied at index 2",
    "admin raft transfer n2": "leadership was handed over",
}


def check_told(done: subprocess.CompletedProcess[str], told: str) -> None:
    assert (done.returncode, done.stderr) == (
        ExitCode.OK, f"{told}; its result could not be printed\n")


@pytest.mark.parametrize("command", CHANGES)
def test_a_change_whose_result_cannot_be_printed_was_made(memory_node: MemoryNode,
                                                          command: str) -> None:
    check_told(run(memory_node, f"{command} >/dev/full"), CHANGES[command])


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["closed pipe", "full"])
def test_however_stdout_fails(memory_node: MemoryNode, full: bool, unbuffered: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(memory_node, f"client put k v {'>/dev/full' if full else ''}", stdout=writer,
                   unbuffered=unbuffered)
    finally:
        os.close(writer)
    check_told(done, "the write was applied at index 1")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", [
    "client get k", "client get k --raw", "client scan", "client get k --output json",
    "admin raft status"])
def test_what_was_read_and_cannot_be_printed_is_an_error(memory_node: MemoryNode, command: str,
                                                         unbuffered: bool) -> None:
    run(memory_node, "client put k v")
    done = run(memory_node, f"{command} >/dev/full", unbuffered=unbuffered)
    assert done.returncode == ExitCode.ERROR
    assert done.stderr == "elastickv: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["put", "k", "-"], ["put", "k", "--value-file", "-"],
                                       ["batch", "--file", "-"]], ids=" ".join)
def test_a_value_that_stdin_cannot_give(memory_node: MemoryNode, arguments: Sequence[str]) -> None:
    done = run(memory_node, f"client {' '.join(arguments)} <&-")
    assert (done.returncode, "stdin" in done.stderr) == (ExitCode.USAGE, True)
    assert done.stderr.count("\n") == 1
    assert memory_node.kv.index == 0


def test_operations_on_stdin_are_utf_8_in_every_locale(memory_node: MemoryNode) -> None:
    line = b'{"op": "put", "key": "gr\xc3\xbc\xc3\x9fe", "value": "1"}\\n'.decode()
    done = run(memory_node, f"client batch --file - < <(printf '{line}')", encoding="latin-1")
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")
    found = run(memory_node, "client get base64:Z3LDvMOfZQ==")
    assert (found.returncode, found.stdout) == (ExitCode.OK, "1\n")


def test_what_is_printed_is_utf_8_in_every_locale(memory_node: MemoryNode) -> None:
    value = "\u043f\u0440\u0438\u0432\u0435\u0442"
    assert run(memory_node, f"client put greeting {value}").returncode == ExitCode.OK
    found = run(memory_node, "client get greeting", encoding="latin-1")
    assert (found.returncode, found.stdout) == (ExitCode.OK, f"{value}\n")


def test_a_path_that_is_no_utf_8_is_printed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elastickv", "certs", "init", "--dir", tmp_path / "caf\udce9"],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, timeout=60,
        check=False)
    assert (done.returncode, done.stderr) == (ExitCode.OK, b"")
    assert b"/caf\xe9/ca.crt\n" in done.stdout


def test_wrong_options_are_wrong_options_without_stderr(memory_node: MemoryNode) -> None:
    for redirection in ("2>/dev/full", "2>&-"):
        assert run(memory_node, f"client get {redirection}").returncode == ExitCode.USAGE


def test_a_member_that_is_not_trusted_is_one_line(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        certs.create_ca(tmp_path / name)
    server = certs.create_node(tmp_path / "theirs", "n1")
    client = certs.create_client(tmp_path / "ours", "alice")
    files = TlsFiles(server.cert, server.key, tmp_path / "theirs" / "ca.crt")
    with in_thread(MemoryNode(tls=files)) as node:
        done = subprocess.run(
            [sys.executable, "-m", "elastickv", "client", "get", "k", "--endpoints", node.address,
             "--tls-ca", tmp_path / "ours" / "ca.crt", "--tls-cert", client.cert,
             "--tls-key", client.key, "--timeout", "1"],
            env={name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"},
            capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.UNAVAILABLE
    [line] = done.stderr.splitlines()
    assert "certificate" in line
