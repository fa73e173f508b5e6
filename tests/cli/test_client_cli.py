"""`elastickv client` against a real server."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shlex
from pathlib import Path

import pytest
from cli_shell import Done, Shell
from memory_node import MemoryNode, eventually, running

from elastickv.cli.client import apply_chunks, oldest_ms
from elastickv.cli.main import run
from elastickv.client import Client, Put
from elastickv.errors import ConditionFailed, ExitCode, IntegrityError, NoLeader, OutcomeUnknown

BINARY = bytes(range(256))


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_put_get_delete(shell: Shell) -> None:
    put = shell("client", "put", "greeting", "hello world")
    assert (put.code, put.err) == (0, "")
    assert b"commit index  1" in put.out
    assert shell("client", "get", "greeting").out == b"hello world\n"
    assert shell("client", "delete", "greeting", "--output", "json").document["commit_index"] == 2
    gone = shell("client", "get", "greeting")
    assert (gone.code, gone.out, gone.err) == (1, b"", "not found\n")


def test_get_as_json(shell: Shell) -> None:
    written = shell("client", "put", "k", "hello", "--output", "json").document
    found = shell("client", "get", "k", "--output", "json")
    assert found.code == 0
    assert found.document == {
        "key": encoded(b"k"), "key_text": "k", "exists": True, "value": encoded(b"hello"),
        "value_text": "hello", "commit_ts": written["commit_ts"],
        "commit_ts_text": str(written["commit_ts"]), "read_at_index": 1, "ttl_ms": 0}
    absent = shell("client", "get", "other", "--output", "json")
    assert (absent.code, absent.document["exists"], absent.document["value"]) == (1, False, "")


def test_a_stale_read_says_how_old_it_is(shell: Shell, memory_node: MemoryNode) -> None:
    shell("client", "put", "k", "v")
    memory_node.kv.stale_ms = 1234
    found = shell("client", "get", "k", "--stale")
    assert (found.code, found.out) == (0, b"v\n")
    assert "1234 ms ago" in found.err
    assert shell("client", "get", "k", "--stale", "--output", "json").document["stale_ms"] == 1234
    memory_node.kv.stale_ms = -1
    assert "never known" in shell("client", "get", "k", "--stale").err
    absent = shell("client", "get", "other", "--stale", "--output", "json")
    assert (absent.code, absent.document["stale_ms"]) == (1, -1)


@pytest.mark.parametrize("output", ["table", "json"])
def test_a_stale_scan_says_how_old_it_is(shell: Shell, memory_node: MemoryNode,
                                         output: str) -> None:
    scan = ["client", "scan", "--output", output]
    shell("client", "put", "k", "v")
    memory_node.kv.stale_ms = 1234
    found = shell(*scan, "--stale")
    assert (found.code, found.out) == (0, shell(*scan).out)
    age = re.fullmatch(r"stale read: this member was known to have everything (\d+) ms ago\n",
                       found.err)
    assert age is not None
    assert int(age[1]) >= 1234
    assert shell(*scan).err == ""
    memory_node.kv.stale_ms = -1
    assert "never known" in shell(*scan, "--stale").err
    assert "never known" in shell(*scan, "--stale", "--prefix", "none").err


PAGE_AGES: dict[str, tuple[list[tuple[float, int]], float, int]] = {
    "one page": ([(10.0, 7)], 10.0, 7),
    "one page, a while ago": ([(10.0, 7)], 10.25, 257),
    "the first was known longest ago": ([(10.0, 7), (12.0, 5)], 12.0, 2007),
    "the second was known longest ago": ([(10.0, 7), (10.5, 900)], 11.0, 1400),
    "one was never known": ([(10.0, 7), (10.5, -1), (11.0, 5)], 11.0, -1),
}


@pytest.mark.parametrize("name", PAGE_AGES)
def test_a_stale_scan_is_as_old_as_its_oldest_page(name: str) -> None:
    pages, now_s, expected = PAGE_AGES[name]
    assert oldest_ms(pages, now_s) == expected


def test_binary_values_through_stdin_and_stdout(shell: Shell) -> None:
    assert shell("client", "put", "k", "-", stdin=BINARY).code == 0
    assert shell("client", "get", "k", "--raw").out == BINARY
    assert shell("client", "get", "k").out == f"base64:{encoded(BINARY)}\n".encode()
    document = shell("client", "get", "k", "--output", "json").document
    assert (document["value"], document["value_text"]) == (encoded(BINARY), None)


def test_values_from_files(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_bytes(BINARY)
    shell("client", "put", "k", "--value-file", str(path))
    assert shell("client", "get", "k", "--raw").out == BINARY
    shell("client", "put", "k", "--value-file", "-", stdin=b"from stdin")
    assert shell("client", "get", "k", "--raw").out == b"from stdin"


def test_binary_keys(shell: Shell) -> None:
    key = f"base64:{encoded(BINARY)}"
    shell("client", "put", key, "v")
    assert shell("client", "get", key).out == b"v\n"
    assert shell("client", "scan").lines[1] == [key, "v"]


def test_old_versions_and_stale_reads(shell: Shell, memory_node: MemoryNode) -> None:
    old = shell("client", "put", "k", "old", "--output", "json").document["commit_ts"]
    shell("client", "put", "k", "new")
    assert shell("client", "get", "k", "--ts", str(old)).out == b"old\n"
    shell("client", "get", "k", "--stale")
    assert memory_node.faults.before[-2:] == ["read", "stale read"]


def test_scan(shell: Shell) -> None:
    shell("client", "batch", *(word for n in range(6) for word in ("put", f"user/{n}", f"v{n}")),
          "put", "other", "x")
    assert shell("client", "scan", "--prefix", "user/", "--limit", "2").lines == [
        ["key", "value"], ["user/0", "v0"], ["user/1", "v1"]]
    assert shell("client", "scan", "--start", "user/3", "--end", "user/5", "--reverse",
                 "--keys-only").lines == [["key"], ["user/4"], ["user/3"]]
    document = shell("client", "scan", "--start", "user/5", "--output", "json").document
    assert document == [{"key": encoded(b"user/5"), "key_text": "user/5",
                         "value": encoded(b"v5"), "value_text": "v5"}]
    assert shell("client", "scan", "--prefix", "none", "--output", "json").document == []
    assert shell("client", "scan", "--prefix", "none").out == b"key\tvalue\n"


MORE: dict[str, tuple[list[str], str]] = {
    "all": ([], "--start user/2"),
    "prefix": (["--prefix", "user/"], "--start user/2 --end user0 instead of --prefix"),
    "range": (["--start", "user/1", "--end", "user/5"], "--start 'user/3 x' --end user/5"),
    "backward": (["--reverse"], "--end user/5"),
    "backward in a range": (["--reverse", "--start", "user/1", "--end", "user/5"],
                            "--start user/1 --end 'user/3 x'"),
    "backward in a prefix": (["--reverse", "--prefix", "user/"],
                             "--start user/ --end user/4 instead of --prefix"),
}


@pytest.mark.parametrize("output", ["table", "json"])
@pytest.mark.parametrize("name", MORE)
def test_a_scan_says_that_more_follow_and_where(shell: Shell, name: str, output: str) -> None:
    keys = ["user/0", "user/1", "user/2", "user/3 x", "user/4", "user/5", "zebra"]
    shell("client", "batch", *(word for key in keys for word in ("put", key, "v")))
    options, rest = MORE[name]
    common = ["client", "scan", "--limit", "2", "--keys-only", "--output", output]

    def keys_of(done: Done) -> list[str]:
        if output == "json":
            return [pair["key_text"] for pair in done.document]
        return [line[0] for line in done.lines[1:]]

    done = shell(*common, *options)
    assert done.code == 0
    assert done.err == f"more keys follow: raise --limit, or go on with {rest}\n"
    # Going on until nothing follows shows every key once.
    shown = keys_of(done)
    reverse = ["--reverse"] if "--reverse" in options else []
    while done.err:
        words = shlex.split(done.err.partition("go on with ")[2].replace("instead of --prefix", ""))
        done = shell(*common, *reverse, *words)
        shown += keys_of(done)
    whole = shell("client", "scan", "--keys-only", "--output", output, *options)
    assert whole.err == ""
    assert shown == keys_of(whole)


def test_a_key_that_is_no_text_can_be_gone_on_from(shell: Shell) -> None:
    shell("client", "batch", "put", "a", "1", "put", f"base64:{encoded(BINARY[::-1])}", "2")
    done = shell("client", "scan", "--limit", "1", "--reverse")
    rest = shlex.split(done.err.partition("go on with ")[2])
    assert [line[0] for line in shell("client", "scan", "--reverse", *rest).lines] == ["key", "a"]


def test_the_default_limit_of_a_scan_is_not_silent(shell: Shell) -> None:
    shell("client", "batch", *(word for n in range(100) for word in ("put", f"{n:03}", "v")))
    assert shell("client", "scan").err == ""
    shell("client", "put", "100", "v")
    done = shell("client", "scan")
    assert (done.code, len(done.lines), done.err) == (
        0, 101, "more keys follow: raise --limit, or go on with --start 100\n")


def test_a_scan_of_several_pages(shell: Shell, memory_node: MemoryNode) -> None:
    lines = "".join(json.dumps({"op": "put", "key": f"{n:05}", "value": ""}) + "\n"
                    for n in range(2500))
    loaded = shell("client", "batch", "--file", "-", "--chunk", "1000", stdin=lines.encode())
    assert loaded.code == 0
    assert memory_node.kv.index == 3
    most = shell("client", "scan", "--limit", "2200", "--keys-only")
    assert (len(most.lines), most.err.endswith("--start 02200\n")) == (2201, True)
    page = shell("client", "scan", "--limit", "1000", "--keys-only")
    assert (len(page.lines), page.err.endswith("--start 01000\n")) == (1001, True)
    assert len(shell("client", "scan", "--limit", "9999", "--keys-only").lines) == 2501


def test_batch_is_atomic_and_conditional(shell: Shell, memory_node: MemoryNode) -> None:
    done = shell("client", "batch", "put", "a", "1", "put", "b", "2", "delete", "a", "--if", "a=0",
                 "--output", "json")
    assert done.document["operations"] == 3
    assert memory_node.kv.index == 1
    assert shell("client", "scan").lines[1:] == [["b", "2"]]
    refused = shell("client", "batch", "put", "c", "3", "--if", "b=1")
    assert (refused.code, refused.out) == (1, b"")
    assert "condition" in refused.err
    held = done.document["commit_ts"]
    assert shell("client", "batch", "put", "b", "3", "--if", f"b={held}").code == 0


@pytest.mark.parametrize("words", [["put", "k", "2"], ["delete", "k"], ["batch", "put", "k", "2"]],
                         ids=lambda words: words[0])
def test_a_timestamp_is_also_text_that_no_program_rounds(shell: Shell, words: list[str]) -> None:
    shell("client", "put", "k", "1")
    document = shell("client", "get", "k", "--output", "json").document
    text = document["commit_ts_text"]
    assert int(text) == document["commit_ts"] > 1 << 53
    written = shell("client", *words, "--output", "json").document
    assert written["commit_ts_text"] == str(written["commit_ts"])
    assert b"commit ts text" not in shell("client", *words).out
    assert shell("client", "get", "k", "--ts", text).out == b"1\n"
    shell("client", "put", "k", "3")
    last = shell("client", "get", "k", "--output", "json").document["commit_ts_text"]
    assert shell("client", "batch", "put", "k", "4", "--if", f"k={text}").code == 1
    assert shell("client", "batch", "put", "k", "4", "--if", f"k={last}").code == 0


def test_a_chunk_that_fails_says_how_far_it_came(shell: Shell, memory_node: MemoryNode,
                                                 tmp_path: Path) -> None:
    path = tmp_path / "ops"
    path.write_text('{"op": "put", "key": "a", "value": "1"}\n'
                    '{"op": "put", "key": "b", "value": "2"}\n'
                    '{"op": "put", "key": "", "value": "3"}\n')
    done = shell("client", "batch", "--file", str(path), "--chunk", "2")
    assert done.code == 1
    assert "the first 2 operations were applied" in done.err
    assert memory_node.kv.index == 1


async def test_an_interrupted_chunk_says_how_far_it_came(
        capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C cancels the command; here the server has the second chunk by then."""
    ops = [Put(b"%d" % number, b"") for number in range(5)]
    node = MemoryNode()
    async with running(node), Client([node.address]) as api:
        first_chunk = node.faults.hold = asyncio.Event()
        command = asyncio.create_task(apply_chunks(api, ops, (), 2))
        await eventually(lambda: len(node.faults.before) == 1)
        node.faults.hold = asyncio.Event()
        first_chunk.set()
        await eventually(lambda: len(node.faults.before) == 2)
        command.cancel()
        with pytest.raises(asyncio.CancelledError):
            await command
    assert capsys.readouterr().err == (
        "the first 2 operations were applied, the next 2 may have been\n")


@pytest.mark.parametrize(("error", "code"), [
    (OutcomeUnknown("who knows"), ExitCode.OUTCOME_UNKNOWN),
    (ConditionFailed("no"), ExitCode.ERROR),
    (IntegrityError("does not open"), ExitCode.CORRUPTION),
])
def test_exit_codes_of_errors(shell: Shell, memory_node: MemoryNode, error: Exception,
                              code: ExitCode) -> None:
    memory_node.faults.errors.append(error)
    done = shell("client", "put", "k", "v")
    assert (done.code, done.out) == (code, b"")
    assert str(error).split(".")[0] in done.err
    assert done.err.startswith("elastickv: ")
    assert done.err.count("\n") == 1


def test_no_leader_and_nobody_there(shell: Shell, memory_node: MemoryNode) -> None:
    memory_node.faults.errors.extend(NoLeader("nobody leads") for _ in range(1000))
    done = shell("client", "put", "k", "v", "--timeout", "0.3")
    assert (done.code, "nobody leads" in done.err) == (ExitCode.UNAVAILABLE, True)
    memory_node.faults.errors.clear()
    done = shell("client", "get", "k", "--endpoints", "127.0.0.1:1", "--timeout", "0.2")
    assert (done.code, "127.0.0.1:1" in done.err) == (ExitCode.UNAVAILABLE, True)


def test_several_endpoints(shell: Shell, memory_node: MemoryNode) -> None:
    endpoints = f"127.0.0.1:1, {memory_node.address}"
    assert shell("client", "put", "k", "v", "--endpoints", endpoints).code == 0


USAGE: dict[str, list[str]] = {
    "no value": ["client", "put", "k"],
    "two values": ["client", "put", "k", "v", "--value-file", "f"],
    "no such file": ["client", "put", "k", "--value-file", "/no/such/file"],
    "negative ttl": ["client", "put", "k", "v", "--ttl-ms", "-1"],
    "raw json": ["client", "get", "k", "--raw", "--output", "json"],
    "no operation": ["client", "batch"],
    "an unknown operation": ["client", "batch", "get", "k"],
    "operations twice": ["client", "batch", "delete", "k", "--file", "f"],
    "no such batch": ["client", "batch", "--file", "/no/such/file"],
    "chunks with a condition": ["client", "batch", "delete", "k", "--chunk", "2", "--if", "k=0"],
    "a bad condition": ["client", "batch", "delete", "k", "--if", "k"],
    "a prefix and a start": ["client", "scan", "--prefix", "a", "--start", "b"],
    "limit 0": ["client", "scan", "--limit", "0"],
    "timeout 0": ["client", "get", "k", "--timeout", "0"],
    "bad endpoint": ["client", "get", "k", "--endpoints", "nonsense"],
    "no endpoint": ["client", "get", "k", "--endpoints", ","],
    "unknown output": ["client", "get", "k", "--output", "xml"],
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(shell: Shell, memory_node: MemoryNode, name: str) -> None:
    done = shell(*USAGE[name])
    assert (done.code, done.out) == (ExitCode.USAGE, b"")
    assert done.err
    assert memory_node.faults.before == []


@pytest.mark.parametrize(("arguments", "named"), [
    (["--endpoints", "127.0.0.1:1"], "--tls-ca, --tls-cert, --tls-key missing"),
    (["--endpoints", "127.0.0.1:1", "--tls-ca", "ca.crt"], "--tls-cert, --tls-key missing"),
    (["--endpoints", "10.0.0.1:1,127.0.0.1:1", "--insecure"], "10.0.0.1:1 is not on this machine"),
    (["--tls-ca", "/none", "--tls-cert", "/none", "--tls-key", "/none"], "cannot be used"),
])
def test_transport_options_that_are_refused(arguments: list[str], named: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["client", "get", "k", *arguments]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert named in captured.err
    assert "Remedy" in captured.err


@pytest.mark.parametrize("command", ["put", "get", "delete", "scan", "batch"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["client", command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"elastickv client {command} " in out
    for option in ("--endpoints", "ELASTICKV_ENDPOINTS", "--tls-ca", "--insecure", "--timeout",
                   "--output"):
        assert option in out
