"""A laboratory for engines: virtual time, in-memory disks, links under the test's control.

Everything runs in one event loop whose clock jumps to the next timer, so a scenario of many seconds
takes milliseconds and always runs the same way.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from elastickv.durable import DiskFile
from elastickv.errors import DiskFull
from elastickv.raft.engine import Entry, Member, Role, SnapshotExport, SnapshotImport
from elastickv.raft.frames import AnyMessage, decode_message, encode_message
from elastickv.raft.links import LinkEvents
from elastickv.raft.offload import Done
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.settings import EngineSettings

T = TypeVar("T")
LATENCY_S = 0.001
PART_BYTES = 16 << 10
"""What a member reads at once of a message that is on its way: under TLS, a record."""


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting, moves the loop's clock."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("the scenario waits for something that will never happen")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario to its end in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(scenario)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


class MemoryFile:
    """A file in a `MemoryDisk`."""

    def __init__(self, disk: MemoryDisk, path: Path, size: int | None = None) -> None:
        self._disk, self._path = disk, path
        self._size = len(self.data) if size is None else size

    @property
    def data(self) -> bytearray:
        return self._disk.files[self._path]

    def pread(self, size: int, offset: int) -> bytes:
        return bytes(self.data[offset:offset + size])

    def append(self, data: bytes) -> None:
        self._disk.check("append")
        self.data[self._size:self._size + len(data)] = data
        self._size += len(data)

    def sync(self) -> None:
        self._disk.check("sync")

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self._size = size

    def rewrite(self, offset: int) -> None:
        pass

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        pass


class MemoryDisk:
    """Files in memory. `fail` maps an operation to the error that it raises."""

    def __init__(self) -> None:
        self.files: dict[Path, bytearray] = {}
        self.fail: dict[str, Exception] = {}

    def check(self, operation: str) -> None:
        if operation in self.fail:
            raise self.fail[operation]

    def copy(self) -> dict[Path, bytearray]:
        """What an administrator's backup of the whole disk would hold."""
        return {path: bytearray(data) for path, data in self.files.items()}

    def open_append(self, path: Path) -> DiskFile:
        if path not in self.files:
            raise FileNotFoundError(path)
        return MemoryFile(self, path)

    def reuse(self, source: Path, target: Path, head: bytes) -> DiskFile:
        self.files[source][:len(head)] = head
        self.rename(source, target)
        return MemoryFile(self, target, len(head))

    def read(self, path: Path) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(path)
        return bytes(self.files[path])

    def exists(self, path: Path) -> bool:
        return path in self.files

    def list(self, directory: Path) -> list[str]:
        return sorted(path.name for path in self.files if path.parent == directory)

    def make_directory(self, path: Path) -> None:
        pass

    def replace(self, path: Path, data: bytes) -> None:
        self.check("replace")
        self.files[path] = bytearray(data)

    def rename(self, source: Path, target: Path) -> None:
        self.files[target] = self.files.pop(source)

    def remove(self, path: Path) -> None:
        self.files.pop(path, None)

    def sync_directory(self, path: Path) -> None:
        pass


class HeldOffload:
    """Runs at once, or keeps work back until `release`."""

    def __init__(self) -> None:
        self.holding = False
        self._jobs: list[tuple[Callable[[], None], Done]] = []

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def submit(self, work: Callable[[], None], done: Done) -> None:
        self._jobs.append((work, done))
        if not self.holding:
            self.release()

    def release(self) -> None:
        self.holding = False
        while self._jobs:
            work, done = self._jobs.pop(0)
            try:
                work()
            except Exception as error:
                done(error)
            else:
                done(None)

    def close(self) -> None:
        self.release()


class Hub:
    """The network between `HubLinks`. `rule(source, target, message)` returns how often a message
    is delivered (0, 1 or 2). `bytes_per_s` is what a link carries each way, or with `one_wire` all
    links of a sender together, one message after the other. From a member in `silenced` no byte
    arrives any more, and none at it, and nobody is told."""

    def __init__(self) -> None:
        self.up: dict[str, HubLinks] = {}
        self.links: dict[frozenset[str], int] = {}
        self.cut_pairs: set[frozenset[str]] = set()
        self.rule: Callable[[str, str, AnyMessage], int] = lambda source, target, message: 1
        self.log: list[tuple[str, str, AnyMessage]] = []
        self.bytes_per_s = math.inf
        self.one_wire = False
        self.silenced: set[str] = set()
        self._wire_free_at: dict[tuple[str, str], float] = {}
        self._sessions = 0
        self._arrivals: dict[tuple[str, str], float] = {}

    def sent(self, kind: type[T], source: str = "") -> list[T]:
        """Messages of `kind` that were sent, perhaps only those of one sender."""
        return [m for s, _, m in self.log if isinstance(m, kind) and source in ("", s)]

    def isolate(self, node_id: str, others: Sequence[str] | None = None) -> None:
        """Cut a node off from `others` (default: everybody)."""
        for other in others if others is not None else list(self.up):
            if other != node_id:
                self.cut_pairs.add(frozenset((node_id, other)))
                self.disconnect(node_id, other)

    def heal(self) -> None:
        """Every link may come up again."""
        self.cut_pairs.clear()
        self.connect_all()

    def connect_all(self) -> None:
        for first in list(self.up):
            for second in list(self.up):
                if first < second:
                    self.connect(first, second)

    def connect(self, first: str, second: str) -> None:
        pair = frozenset((first, second))
        if pair in self.cut_pairs or pair in self.links or not {first, second} <= set(self.up):
            return
        self._sessions += 1
        self.links[pair] = self._sessions
        one, two = self.up[first].events, self.up[second].events
        hello_one, hello_two = one.make_hello(second), two.make_hello(first)
        one.connected(second, hello_two)
        two.connected(first, hello_one)

    def disconnect(self, first: str, second: str) -> None:
        if self.links.pop(frozenset((first, second)), None) is None:
            return
        for node_id, other in ((first, second), (second, first)):
            if node_id in self.up:
                self.up[node_id].events.disconnected(other)

    def transmit(self, source: str, target: str, body: bytes) -> bool:
        pair = frozenset((source, target))
        session = self.links.get(pair)
        if session is None:
            return False
        message = decode_message(body)
        self.log.append((source, target, message))
        loop = asyncio.get_running_loop()
        wire = (source, "" if self.one_wire else target)
        for _ in range(self.rule(source, target, message)):
            begin = max(loop.time(), self._wire_free_at.get(wire, 0.0))
            end = self._wire_free_at[wire] = begin + len(body) / self.bytes_per_s
            if end > begin:
                for size in range(PART_BYTES, len(body), PART_BYTES):
                    loop.call_at(begin + size / self.bytes_per_s + LATENCY_S, self._deliver_part,
                                 session, source, target)
            # Strictly later than what was sent before, so that the order is kept.
            arrival = max(end + LATENCY_S, self._arrivals.get((source, target), 0.0) + 1e-7)
            self._arrivals[(source, target)] = arrival
            loop.call_at(arrival, self._deliver, session, source, target, body)
        return True

    def _carries(self, session: int, source: str, target: str) -> bool:
        return (self.links.get(frozenset((source, target))) == session
                and self.silenced.isdisjoint((source, target)))

    def _deliver(self, session: int, source: str, target: str, body: bytes) -> None:
        if self._carries(session, source, target):
            self.up[target].events.received(source, body)

    def _deliver_part(self, session: int, source: str, target: str) -> None:
        if self._carries(session, source, target):
            self.up[target].events.receiving(source)

    def inject(self, source: str, target: str, message: AnyMessage) -> None:
        """A message from `source` that it never sent."""
        self.up[target].events.received(source, encode_message(message))


class HubLinks:
    """`Links` over a `Hub`."""

    def __init__(self, hub: Hub, node_id: str) -> None:
        self._hub, self._node_id = hub, node_id
        self.events: LinkEvents

    async def start(self, events: LinkEvents) -> None:
        self.events = events
        self._hub.up[self._node_id] = self
        asyncio.get_running_loop().call_soon(self._hub.connect_all)

    async def stop(self) -> None:
        self.vanish()

    def vanish(self) -> None:
        """The process is gone."""
        if self._hub.up.get(self._node_id) is self:
            for other in list(self._hub.up):
                self._hub.disconnect(self._node_id, other)
            del self._hub.up[self._node_id]

    def set_peers(self, addresses: Mapping[str, str]) -> None:
        asyncio.get_running_loop().call_soon(self._hub.connect_all)

    def send(self, peer_id: str, body: bytes) -> bool:
        return self._hub.transmit(self._node_id, peer_id, body)

    def flush(self) -> None:
        pass

    def drop(self, peer_id: str) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(self._hub.disconnect, self._node_id, peer_id)
        loop.call_later(0.1, self._hub.connect, *sorted((self._node_id, peer_id)))


class ListState:
    """A state machine and its own snapshot source: the list of entries, durable at once unless
    `flushed_index` says how far."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.fail_on: bytes | None = None
        self.full_on: bytes | None = None
        self.fails_with: Exception | None = None
        self.takes_more = True
        self.is_ready = True
        self.read_ahead: Callable[[], None] | None = None
        """What an export wants to have done before each chunk."""
        self.flushed_index: int | None = None
        self.apply_calls = 0

    @property
    def applied_index(self) -> int:
        return self.entries[-1].index if self.entries else 0

    @property
    def durable_index(self) -> int:
        return self.applied_index if self.flushed_index is None else self.flushed_index

    def may_apply(self) -> bool:
        return self.takes_more

    def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        self.apply_calls += 1
        if not self.is_ready:
            return []
        if self.fails_with is not None:
            raise self.fails_with
        if any(entry.payload == self.fail_on for entry in entries):
            raise ValueError("cannot apply")
        results = []
        for entry in entries:
            if entry.payload == self.full_on:
                if not results:
                    raise DiskFull("no space left")
                break
            if self.entries and entry.index != self.applied_index + 1:
                raise AssertionError(f"{entry.index} applied after {self.applied_index}")
            self.entries.append(entry)
            results.append(entry.payload)
        return results

    def payloads(self) -> list[bytes]:
        return [entry.payload for entry in self.entries if entry.payload]

    def open_export(self) -> SnapshotExport:
        return _Export(self.entries, self.read_ahead)

    def open_import(self) -> SnapshotImport:
        return _Import(self)


class _Export:
    def __init__(self, entries: Sequence[Entry], read_ahead: Callable[[], None] | None) -> None:
        self._rows = [b"%d %d %s\n" % (e.index, e.term, e.payload) for e in entries]
        self.applied_index = entries[-1].index
        self._read_ahead = read_ahead

    def read_ahead(self, max_bytes: int) -> Callable[[], None] | None:
        return self._read_ahead

    def read(self, max_bytes: int) -> bytes:
        chunk = b""
        while self._rows and (not chunk or len(chunk) + len(self._rows[0]) <= max_bytes):
            chunk += self._rows.pop(0)
        return chunk

    def close(self) -> None:
        self._rows = []


class _Import:
    def __init__(self, state: ListState) -> None:
        self._state, self._data = state, b""

    def write(self, chunk: bytes) -> None:
        self._data += chunk

    def finish(self) -> int:
        rows = [line.split(b" ", 2) for line in self._data.splitlines()]
        self._state.entries = [Entry(int(i), int(t), payload) for i, t, payload in rows]
        return self._state.applied_index

    def abort(self) -> None:
        self._data = b""


class LabNode:
    """One member. The disk and the state outlive its engine."""

    def __init__(self, lab: Lab, member: Member, **overrides: Any) -> None:
        self.lab, self.member, self.overrides = lab, member, overrides
        self.disk = MemoryDisk()
        self.state = ListState()
        self.path = Path("/raft")
        self.boots = 0

    @property
    def node_id(self) -> str:
        return self.member.node_id

    async def start(self) -> None:
        self.boots += 1
        self.fatal: list[BaseException] = []
        self.offload = HeldOffload()
        self.read_ahead = HeldOffload()
        settings = EngineSettings(self.node_id, self.lab.members, self.path,
                                  **{"inline_sync_bytes": 0, **self.lab.overrides,
                                     **self.overrides})
        self.links = HubLinks(self.lab.hub, self.node_id)
        self.engine = PySyncObjEngine(
            settings, self.state, self.disk, self.links, offload=self.offload,
            read_ahead=self.read_ahead,
            generator=random.Random(f"{self.node_id}/{self.boots}"), snapshots=self.state)
        self.engine.on_fatal(self.fatal.append)
        await self.engine.start()

    def kill(self) -> None:
        """The process is gone; what it had written stays."""
        self.links.vanish()
        self.engine._running = False

    async def restart(self) -> None:
        self.kill()
        await self.start()

    def put_back(self, backup: Mapping[Path, bytearray], applied: int) -> None:
        """Put an old copy of the whole disk back, the state machine's part included."""
        self.disk.files = {path: bytearray(data) for path, data in backup.items()}
        self.state.entries = [e for e in self.state.entries if e.index <= applied]

    @property
    def core(self) -> Any:
        return self.engine._core

    @property
    def journal(self) -> Any:
        return self.engine._journal

    def status(self) -> Any:
        return self.engine.status()


class Lab:
    """A cluster in the laboratory."""

    def __init__(self, size: int = 3, **overrides: Any) -> None:
        self.hub = Hub()
        self.overrides = overrides
        self.members = [Member(f"n{number}", f"host{number}:1")
                        for number in range(1, size + 1)]
        self.nodes = {member.node_id: LabNode(self, member) for member in self.members}

    async def start(self) -> LabNode:
        """Start all and wait for a leader."""
        for node in self.nodes.values():
            await node.start()
        return await self.leader()

    def node(self, node_id: str) -> LabNode:
        return self.nodes[node_id]

    async def leader(self, among: Sequence[LabNode] | None = None) -> LabNode:
        nodes = list(among or self.nodes.values())
        await self.until(lambda: any(node.engine.is_leader() for node in nodes))
        return next(node for node in nodes if node.engine.is_leader())

    def others(self, *excluded: LabNode) -> list[LabNode]:
        return [node for node in self.nodes.values() if node not in excluded]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait, in virtual time, for a condition."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not condition():
            if loop.time() > deadline:
                raise AssertionError("the condition did not come true in time")
            await asyncio.sleep(LATENCY_S)

    async def settle(self, *nodes: LabNode) -> None:
        """Wait until every running node (default: of all) has applied the same."""
        await self.until(lambda: len({node.state.applied_index
                                      for node in nodes or self.nodes.values()
                                      if node.status().role is not Role.SHUTDOWN}) == 1)


async def outcome(awaitable: Awaitable[T]) -> T | BaseException:
    """The result, or the error that was raised instead."""
    try:
        return await awaitable
    except Exception as error:
        return error
