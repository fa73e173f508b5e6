"""A TCP proxy in every link, in this process: needs no privilege and works on every Linux.

What members know as the address of a node is a port of this proxy; the node itself listens at a
loopback address of its own, and dials from there. So each connection's two directions belong to
known links, whoever told the dialler the address: each direction is delayed, stalled or cut on its
own, which makes one-way partitions possible. A connection from elsewhere is closed.

What a cut means for TCP: bytes under way are held, not lost, and go on after the healing, as
retransmission would have it; a new connection is accepted but nothing passes until both of its
directions are open, as if its first packets were lost; an end of stream waits its turn too. Loss
delays what follows by a retransmission timeout that doubles with each loss in a row. A narrow link
passes bytes on at its rate, a packet at a time, and takes no more from the sender than its queue
holds: what is large arrives bit by bit, and what is sent behind it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

from jepsen.network.api import CLEAN, Link, LinkShape
from jepsen.network.ports import HOST, free_ports

FIRST_HOST = 11
"""Nodes are 127.0.0.11 and up: all of 127.0.0.0/8 is this machine, without any set-up."""

CHUNK_BYTES = 64 * 1024
MAX_HELD_BYTES = 8 * 1024 * 1024
NARROW_HELD_BYTES = 64 * 1024
"""The same of a narrow link: a router's queue, which holds some packets and not seconds of them."""

PACKET_BYTES = 1448
"""What a TCP segment carries on Ethernet."""

RETRANSMIT_S = 0.2
"""The least retransmission timeout of Linux."""

MAX_RETRANSMIT_S = 3.0

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _LinkState:
    """One direction between two nodes, shared by all connections over it."""

    def __init__(self, source: random.Random) -> None:
        self.shape = CLEAN
        self.touched = 0
        """Pieces that were held, delayed or lost since the last healing."""
        self._random = source
        self._free_at = 0.0
        self._open = asyncio.Event()
        self._open.set()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def cut(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self.shape = CLEAN
        self.touched = 0
        self._free_at = 0.0
        self._open.set()

    @property
    def max_held_bytes(self) -> int:
        """What one connection may have under way."""
        return NARROW_HELD_BYTES if self.shape.is_narrow else MAX_HELD_BYTES

    async def carry(self, size: int) -> None:
        """Wait as long as `size` bytes take, behind what all connections have sent before."""
        if not self.shape.is_narrow:
            return
        self.touched += 1
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + size * 8 / (self.shape.rate_kbit_s * 1000)
        await asyncio.sleep(self._free_at - now)

    async def wait_open(self) -> None:
        self.touched += not self.is_open
        await self._open.wait()

    def delay_s(self) -> float:
        """How long the next piece is under way."""
        shape = self.shape
        if shape is CLEAN:
            return 0.0
        self.touched += 1
        delay_s = max(0.0, self._random.gauss(shape.latency_ms, shape.jitter_ms)) / 1000
        timeout_s = RETRANSMIT_S
        while self._random.random() < shape.loss and timeout_s < MAX_RETRANSMIT_S:
            delay_s += timeout_s
            timeout_s *= 2
        return delay_s


class _Pump:
    """Moves bytes in one direction of one connection, in order, as its link allows."""

    def __init__(self, reader: asyncio.StreamReader, link: _LinkState) -> None:
        self._reader = reader
        self._link = link
        # (due, bytes); b"" is the end of the stream.
        self._held: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._has_work = asyncio.Event()
        self._has_room = asyncio.Event()

    async def receive(self) -> None:
        """Take bytes from the sender until it ends or fails."""
        now = asyncio.get_running_loop().time
        while True:
            try:
                data = await self._reader.read(CHUNK_BYTES)
            except OSError:
                data = b""
            self._held.append((now() + self._link.delay_s(), data))
            self._held_bytes += len(data)
            self._has_work.set()
            if not data:
                return
            while self._held_bytes > self._link.max_held_bytes:
                self._has_room.clear()
                await self._has_room.wait()

    async def deliver(self, writer: asyncio.StreamWriter) -> None:
        """Pass them on, each when it is due and the link is open; last the end of the stream."""
        now = asyncio.get_running_loop().time
        while True:
            while not self._held:
                self._has_work.clear()
                await self._has_work.wait()
            due, data = self._held[0]
            if due > now():
                await asyncio.sleep(due - now())
            await self._link.wait_open()
            if not data:
                writer.close()
                return
            for packet in _packets(data, self._link.shape):
                await self._link.carry(len(packet))
                await self._link.wait_open()
                writer.write(packet)
                await writer.drain()
            self._held.popleft()
            self._held_bytes -= len(data)
            self._has_room.set()


class ProxyNetwork:
    """All nodes on the loopback address, a proxy in every link. `seed` decides jitter and loss."""

    name = "proxy"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._links: dict[Link, _LinkState] = {}
        self._client_ports: dict[str, int] = {}
        self._raft_ports: dict[str, int] = {}
        self._hosts: dict[str, str] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, nodes: Sequence[str]) -> None:
        ports = free_ports(2 * len(nodes))
        self._client_ports = dict(zip(nodes, ports[:len(nodes)], strict=True))
        self._raft_ports = dict(zip(nodes, ports[len(nodes):], strict=True))
        self._hosts = {node: f"127.0.0.{number}" for number, node in enumerate(nodes, FIRST_HOST)}
        for target in nodes:
            for source in nodes:
                if source != target:
                    link = Link(source, target)
                    self._links[link] = _LinkState(random.Random(f"{self._seed} {link}"))
            self._servers[target] = await asyncio.start_server(
                self._handler(target), HOST, 0, limit=CHUNK_BYTES)

    def _handler(self, target: str) -> Handler:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)
            # Nobody awaits this task: the ends of connections and of the run are not errors.
            with contextlib.suppress(asyncio.CancelledError, OSError, ExceptionGroup):
                host = writer.get_extra_info("peername")[0]
                source = next((node for node, own in self._hosts.items() if own == host), target)
                if source != target:
                    await self._relay(Link(source, target), reader, writer)
            writer.transport.abort()

        return serve

    async def _relay(self, link: Link, reader: asyncio.StreamReader,
                     writer: asyncio.StreamWriter) -> None:
        there, back = self._links[link], self._links[Link(link.target, link.source)]
        forth = _Pump(reader, there)
        received = asyncio.create_task(forth.receive())
        try:
            if not await _opened_before(received, there, back):
                return  # The dialler gave up while nothing passed: the other end never hears of it.
            far_reader, far_writer = await asyncio.open_connection(
                self._hosts[link.target], self._raft_ports[link.target], limit=CHUNK_BYTES)
            for end in (writer, far_writer):
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = _Pump(far_reader, back)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(forth.deliver(far_writer))
                    group.create_task(answers.receive())
                    group.create_task(answers.deliver(writer))
            finally:
                far_writer.transport.abort()
        finally:
            received.cancel()

    def client_address(self, node: str) -> str:
        return f"{HOST}:{self._client_ports[node]}"

    def raft_address(self, node: str) -> str:
        return f"{HOST}:{self._servers[node].sockets[0].getsockname()[1]}"

    def raft_listen_address(self, node: str) -> str:
        return f"{self._hosts[node]}:{self._raft_ports[node]}"

    def launch_prefix(self, node: str) -> list[str]:
        return []

    async def cut(self, links: Iterable[Link]) -> None:
        for link in links:
            self._links[link].cut()

    async def shape(self, links: Iterable[Link], shape: LinkShape) -> None:
        for link in links:
            self._links[link].shape = shape

    async def effect(self) -> int:
        return sum(state.touched for state in self._links.values())

    async def heal(self) -> None:
        for state in self._links.values():
            state.heal()

    async def stop(self) -> None:
        for server in self._servers.values():
            server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._servers.clear()


def _packets(data: bytes, shape: LinkShape) -> list[bytes]:
    """What arrives at once of `data`."""
    if not shape.is_narrow:
        return [data]
    return [data[start:start + PACKET_BYTES] for start in range(0, len(data), PACKET_BYTES)]


async def _opened_before(ended: asyncio.Task[None], *links: _LinkState) -> bool:
    """Wait until all of `links` are open; False when `ended` is done first."""
    while not all(link.is_open for link in links):
        waits = [asyncio.create_task(link.wait_open()) for link in links if not link.is_open]
        try:
            await asyncio.wait([ended, *waits], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if ended.done():
            return False
    return True
