"""elastickv.client.SyncClient: the same surface, blocking."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from memory_node import MemoryNode, in_thread

from elastickv import certs
from elastickv.client import (
    Client,
    Condition,
    Delete,
    EncryptionCalls,
    Pair,
    Purpose,
    Put,
    RaftCalls,
    Role,
    SyncClient,
    SyncEncryptionCalls,
    SyncRaftCalls,
    TlsFiles,
    Writer,
)
from elastickv.errors import (
    ClientClosed,
    ConfigError,
    GateOff,
    InvalidArgument,
    OutcomeUnknown,
    Unreachable,
)


@pytest.fixture
def node() -> Iterator[MemoryNode]:
    with in_thread(MemoryNode()) as node:
        yield node


def public(kind: type) -> dict[str, Callable[..., object]]:
    return {name: value for name, value in vars(kind).items()
            if inspect.isfunction(value) and not name.startswith("_")}


@pytest.mark.parametrize(("blocking", "original"), [
    (SyncClient, Client), (SyncEncryptionCalls, EncryptionCalls), (SyncRaftCalls, RaftCalls)],
    ids=["keys", "encryption", "raft"])
def test_the_surface_is_the_same(blocking: type, original: type) -> None:
    ours, theirs = public(blocking), public(original)
    assert set(ours) == set(theirs)
    for name, function in ours.items():
        assert function.__doc__
        assert inspect.signature(function).parameters == \
            inspect.signature(theirs[name]).parameters, name


def test_keys(node: MemoryNode) -> None:
    with SyncClient([node.address]) as client:
        written = client.put(b"a", b"1")
        assert client.get(b"a").value == b"1"
        assert client.latest_commit_ts(b"a") == (written.commit_ts, True)
        client.batch([Put(b"b", b"2"), Put(b"c", b"3"), Delete(b"a")],
                     conditions=[Condition(b"b", 0)])
        assert client.scan() == [Pair(b"b", b"2"), Pair(b"c", b"3")]
        assert list(client.scan_pages(page=1)) == [[Pair(b"b", b"2")], [Pair(b"c", b"3")]]
        client.delete(b"b")
        assert client.scan(keys_only=True, reverse=True) == [Pair(b"c", b"")]


def test_a_stale_scan_says_how_old_it_is(node: MemoryNode) -> None:
    node.kv.stale_ms = 1234
    with SyncClient([node.address]) as client:
        client.batch([Put(b"a", b"1"), Put(b"b", b"2")])
        told: list[tuple[int, bytes]] = []

        def note(stale_ms: int) -> None:
            told.append((stale_ms, client.get(b"a").value))

        assert len(client.scan(stale=True, on_stale_ms=note)) == 2
        assert told == [(1234, b"1")]
        # The second page is empty, and its age counts as well.
        assert len(list(client.scan_pages(page=2, stale=True, on_stale_ms=note))) == 1
        assert told == [(1234, b"1")] * 3


def test_administration(node: MemoryNode) -> None:
    with SyncClient([node.address]) as client:
        assert client.encryption.bootstrap().storage_dek_id == 1
        assert client.encryption.rotate_dek(Purpose.STORAGE).new_dek_id == 3
        assert client.encryption.register_writers(3, [Writer(5, 1)]) == 3
        client.encryption.enable_storage_envelope()
        assert client.encryption.enable_raft_envelope().applied_index == 5
        assert client.encryption.sidecar_state().active_storage_id == 3
        assert client.encryption.resync_sidecar(5).active_storage_id == 3
        assert client.encryption.capability().sidecar_present
        assert [member.node_id for member in client.encryption.members()] == ["n1", "gone"]
        assert client.raft.status().role is Role.LEADER
        client.raft.add_learner("n2", "127.0.0.1:2")
        client.raft.promote_learner("n2")
        client.raft.add_voter("n3", "127.0.0.1:3")
        client.raft.remove_server("n3")
        assert [member.node_id for member in client.raft.members()] == ["n1", "n2"]
        client.raft.transfer_leadership()


def test_the_documented_program(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "api.md"
    [program] = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    authority = tmp_path / "certs"
    certs.create_ca(authority)
    certs.create_client(authority, "alice")
    pair = certs.create_node(authority, "n1")
    with in_thread(MemoryNode(tls=TlsFiles(pair.cert, pair.key, authority / "ca.crt"))) as node:
        assert "10.0.0.1:50051" in program
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program.replace("10.0.0.1:50051", node.address)],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(page.parents[2])},
            capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert node.kv.index == 2


def test_errors_are_typed(node: MemoryNode) -> None:
    node.encryption.gate = False
    with SyncClient([node.address]) as client:
        with pytest.raises(InvalidArgument):
            client.put(b"", b"v")
        with pytest.raises(GateOff):
            client.encryption.bootstrap()
        assert client.put(b"k", b"v").commit_index == 1


def test_from_several_threads(node: MemoryNode) -> None:
    with SyncClient([node.address]) as client, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: client.put(b"%d" % number, b"v"), range(80)))
        assert len(client.scan()) == 80


def test_closing(node: MemoryNode) -> None:
    with SyncClient([node.address]) as first:  # grpc.aio keeps a thread of its own from now on
        first.get(b"k")
    before = threading.active_count()
    client = SyncClient([node.address])
    client.put(b"k", b"v")
    client.close()
    client.close()
    assert threading.active_count() == before
    with pytest.raises(ClientClosed):
        client.get(b"k")


@pytest.mark.parametrize("reachable", [True, False])
def test_closing_ends_the_calls_of_other_threads(node: MemoryNode, reachable: bool) -> None:
    node.faults.hold = asyncio.Event()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        client = SyncClient([node.address if reachable
                             else f"127.0.0.1:{nobody.getsockname()[1]}"], timeout_s=60)
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(client.put, b"k", b"v")
            while reachable and not node.faults.before:
                threading.Event().wait(0.01)
            client.close()
            assert isinstance(call.exception(20), OutcomeUnknown if reachable else ClientClosed)
    node.faults.hold = None


SIGNAL = """
import asyncio, faulthandler, signal, sys
from elastickv.client import SyncClient
from elastickv.errors import ClientClosed, OutcomeUnknown

faulthandler.dump_traceback_later(20, exit=True)
client = SyncClient([sys.argv[1]])
signal.signal(signal.SIGTERM, lambda number, frame: client.close())
schedule = asyncio.run_coroutine_threadsafe

def around(work, loop):
    asyncio.run_coroutine_threadsafe = schedule
    if sys.argv[2] == "before":
        signal.raise_signal(signal.SIGTERM)
    if sys.argv[2] == "within":
        append = loop._call_soon

        def interrupted(*arguments, **options):
            del loop._call_soon
            signal.raise_signal(signal.SIGTERM)
            return append(*arguments, **options)

        loop._call_soon = interrupted
    future = schedule(work, loop)
    if sys.argv[2] == "after":
        signal.raise_signal(signal.SIGTERM)
    return future

asyncio.run_coroutine_threadsafe = around
try:
    if sys.argv[3] == "close":
        client.close()
    else:
        client.put(b"k", b"v")
except (ClientClosed, OutcomeUnknown) as error:
    print(type(error).__name__)
client.close()
print("closed")
"""


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("call", ["put", "close"])
def test_a_signal_handler_may_close_the_client(node: MemoryNode, moment: str, call: str) -> None:
    """At the worst moments: while the thread that it interrupts hands a call to the client."""
    node.faults.hold = asyncio.Event()
    done = subprocess.run([sys.executable, "-W", "error", "-c", SIGNAL, node.address, moment, call],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "closed"
    if call == "put":
        ended = {"before": {"ClientClosed"}, "within": {"ClientClosed"},
                 "after": {"ClientClosed", "OutcomeUnknown"}}[moment]
        assert done.stdout.splitlines()[0] in ended
    node.faults.hold = None


ABANDONED = """
import gc, os, sys, threading, time, warnings
from elastickv.client import SyncClient

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def use(client):
    client.get(b"k")
    client.raft.status()

with SyncClient([sys.argv[1]]) as client:
    use(client)
del client
gc.collect()
threads, before = set(threading.enumerate()), descriptors()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(10):
        use(SyncClient([sys.argv[1]]))
        gc.collect()
print(sum(entry.category is ResourceWarning and "SyncClient" in str(entry.message)
          for entry in caught))
for thread in set(threading.enumerate()) - threads:
    thread.join(5)
# gRPC closes its connections in threads of its own.
deadline = time.monotonic() + 10
while descriptors() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(len(set(threading.enumerate()) - threads), max(0, descriptors() - before))
kept = SyncClient([sys.argv[1]]).raft
gc.collect()
print(kept.status().node_id)
"""


def test_a_client_that_nobody_closed_ends_with_a_warning(node: MemoryNode) -> None:
    done = subprocess.run([sys.executable, "-c", ABANDONED, node.address],
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["10", "0 0", "n1"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_the_operations_of_a_batch_may_use_the_client(node: MemoryNode) -> None:
    """They are taken in the caller's thread, which cursors of databases insist on."""
    with SyncClient([node.address], timeout_s=10) as client:
        client.put(b"a", b"1")
        threads = []

        def copies() -> Iterator[Put]:
            threads.append(threading.current_thread())
            yield Put(b"b", client.get(b"a").value)

        def unchanged() -> Iterator[Condition]:
            threads.append(threading.current_thread())
            yield Condition(b"a", client.latest_commit_ts(b"a")[0])

        client.batch(copies(), conditions=unchanged())
        assert threads == [threading.current_thread()] * 2
        assert client.get(b"b").value == b"1"


FORK = """
import os, sys
from elastickv.client import SyncClient
from elastickv.errors import ForkedProcess

def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)

def call(client):
    try:
        print("answered", client.get(b"k").exists, flush=True)
    except ForkedProcess as error:
        print("refused", "spawn" in error.remedy, flush=True)

def make_and_call():
    try:
        with SyncClient([sys.argv[1]]) as client:
            call(client)
    except ForkedProcess:
        print("not made", flush=True)
"""


@pytest.mark.parametrize(("program", "output"), [
    pytest.param("with SyncClient([sys.argv[1]]) as client:\n"
                 "    call(client)\n"
                 "    with client._loop._entry:  # as another thread may hold it\n"
                 "        in_child(lambda: (call(client), client.close()))\n"
                 "    call(client)\n",
                 ["answered False", "refused True", "answered False"], id="a client of before"),
    pytest.param("import asyncio\n"
                 "from elastickv.client import Client\n"
                 "async def get(client):\n"
                 "    try:\n"
                 "        print('answered', (await client.get(b'k')).exists, flush=True)\n"
                 "    except ForkedProcess as error:\n"
                 "        print('refused', 'spawn' in error.remedy, flush=True)\n"
                 "async def made():\n"
                 "    client = Client([sys.argv[1]])\n"
                 "    await get(client)\n"
                 "    return client\n"
                 "client = asyncio.run(made())\n"
                 "in_child(lambda: asyncio.run(get(client)))\n",
                 ["answered False", "refused True"], id="an asyncio client of before"),
    pytest.param("make_and_call()\nin_child(make_and_call)\nmake_and_call()\n",
                 ["answered False", "not made", "answered False"], id="a second client"),
    pytest.param("in_child(make_and_call)\nmake_and_call()\n",
                 ["answered False", "answered False"], id="the first client"),
])
def test_in_a_forked_process(node: MemoryNode, program: str, output: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", FORK + program, node.address],
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == output, done.stderr
    assert done.returncode == 0


def test_bad_settings_leave_no_thread_behind() -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError):
        SyncClient(["nonsense"])
    assert threading.active_count() == before


def test_within_a_running_event_loop() -> None:
    async def blocking_call() -> None:
        with pytest.raises(Unreachable), SyncClient(["127.0.0.1:1"], timeout_s=0.1) as client:
            client.get(b"k")

    asyncio.run(blocking_call())
