"""elastickv.hygiene: no core dumps, and memory that is not swapped where that is allowed."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from elastickv import certs, hygiene
from elastickv.crypto.kek_file import write_kek_file
from elastickv.durable import OsDisk
from elastickv.raft.hardstate import FILE_NAME, HardStateFile

INFINITE = resource.RLIM_INFINITY
MAPS = """\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f0000200000-7f0000201000 rw-p 00000000 00:00 0                          [anon: malloc arena]
7f0000300000-7f0000400000 ---p 00000000 00:00 0
7f0000400000-7f0000500000 r--p 00000000 00:00 0
7f0000500000-7f0100500000 r--s 00000000 fe:01 42                         /data/store/gen-1.mdb
7f0200000000-7f0200001000 rw-s 00000000 fe:01 43                         /data/store/lock.mdb
7f0200100000-7f0200101000 rw-s 00000000 00:01 0
7f0200200000-7f0200203000 rw-p 00001000 fe:01 44                         /usr/lib/libc.so.6
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]
"""


def test_own_memory_is_locked_and_nothing_else() -> None:
    assert list(hygiene.writable_anonymous(MAPS)) == [
        (0x55d0c0000000, 0x21000), (0x7f0000000000, 0x100000), (0x7f0000200000, 0x1000)]


@pytest.mark.parametrize(("limit", "status", "allowed"), [
    (INFINITE, "CapEff:\t0000000000000000\n", True),
    (8 << 20, "Name:\tpython\nCapEff:\t0000000000004000\n", True),
    (8 << 20, "CapEff:\t0000000000003fff\n", False),
    (8 << 20, "Name:\tpython\n", False),
], ids=["no limit", "CAP_IPC_LOCK", "every lower capability", "no capabilities listed"])
def test_memory_is_locked_only_where_no_limit_can_be_hit(limit: int, status: str,
                                                         allowed: bool) -> None:
    assert hygiene.may_lock(limit, status) is allowed


def in_a_process(script: str) -> dict[str, object]:
    """What a script prints as JSON: the measures last as long as their process."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True, timeout=60)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_core_dumps_are_off_for_good() -> None:
    seen = in_a_process("""
import ctypes, json, resource
from elastickv import hygiene
problem = hygiene.disable_core_dumps()
print(json.dumps({"problem": problem, "limit": resource.getrlimit(resource.RLIMIT_CORE),
                  "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)}))
""")
    assert seen == {"problem": "", "limit": [0, 0], "dumpable": 0}


def test_memory_is_locked_or_the_reason_is_told() -> None:
    """Whether this machine allows it is not ours to say; that both agree with the kernel is."""
    seen = in_a_process("""
import json, pathlib
from elastickv import hygiene
lock = hygiene.lock_memory()
status = pathlib.Path("/proc/self/status").read_text()
print(json.dumps({"bytes": lock.locked_bytes, "problem": lock.problem,
                  "kernel": int(status.split("VmLck:")[1].split()[0])}))
""")
    assert bool(seen["kernel"]) is bool(seen["bytes"])
    assert bool(seen["bytes"]) or bool(seen["problem"])


def test_a_low_limit_locks_nothing_and_breaks_nothing() -> None:
    seen = in_a_process("""
import json, pathlib, resource
from elastickv import hygiene
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
hygiene._STATUS = pathlib.Path("/dev/null")  # as of a process without capabilities
lock = hygiene.lock_memory()
big = bytearray(64 << 20)
print(json.dumps({"bytes": lock.locked_bytes, "problem": lock.problem, "big": len(big)}))
""")
    assert seen["bytes"] == 0
    assert "65536" in str(seen["problem"])
    assert seen["big"] == 64 << 20


# Runs `elastickv` and prints, at each opening of a file whose name ends in .key, whether this
# process could still be dumped. (prctl(2): PR_GET_DUMPABLE)
PRINT_AT_KEYS = """
import ctypes, sys
prctl = ctypes.CDLL(None).prctl
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".key"):
        print("dumpable", prctl(3, 0, 0, 0, 0), flush=True)
sys.addaudithook(hook)
from elastickv.cli.main import main
main()
"""


@pytest.mark.parametrize("command", [
    ["node"], ["doctor"], ["admin", "encryption", "resync-sidecar", "--endpoints", "127.0.0.1:1",
                           "--timeout", "0.1"]], ids=lambda command: command[-1])
def test_core_dumps_are_off_before_a_key_is_read(tmp_path: Path, command: list[str]) -> None:
    certs.create_ca(tmp_path)
    certs.create_node(tmp_path, "n1")
    write_kek_file(tmp_path / "kek.key")
    (tmp_path / "data" / "raft").mkdir(parents=True)
    # Of another member: the node reads its keys and refuses to start.
    HardStateFile(OsDisk(), tmp_path / "data" / "raft" / FILE_NAME).begin_boot(
        "n1" if command[0] == "admin" else "n9")
    arguments = ["--raftId", "n1", "--raftDataDir", str(tmp_path / "data"),
                 "--kekFile", str(tmp_path / "kek.key"), "--tls-ca", str(tmp_path / "ca.crt"),
                 "--tls-cert", str(tmp_path / "n1.crt"), "--tls-key", str(tmp_path / "n1.key")]
    done = subprocess.run([sys.executable, "-c", PRINT_AT_KEYS, *command, *arguments],
                          capture_output=True, text=True, timeout=60, check=False)
    seen = [line for line in done.stdout.splitlines() if line.startswith("dumpable")]
    assert len(seen) >= 1, done.stderr
    assert set(seen) == {"dumpable 0"}, done.stderr
