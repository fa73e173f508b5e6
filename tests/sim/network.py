"""A network of byte streams for the shipped transport: its listener and `create_connection`.

A connection delivers in order, each direction with its own delay, and in parts where it is slow.
Frames (the transport's unit) can be lost or doubled; a direction between two nodes can be cut, in
which case bytes wait as TCP's retransmissions do; a connection can be reset, at each end at another
time, while bytes under way still arrive at the end that does not know yet. A request frame is never
doubled: a stream delivers each byte once, and only the engine's own messages promise to bear more
than that.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, Protocol

from elastickv.listening import Listener
from elastickv.raft.frames import HEADER_BYTES
from tests.sim.loop import Life, SimLoop

HELLO_TAG, REQUEST_TAG, RESPONSE_TAG = 1, 14, 15
NEVER_LOST = (HELLO_TAG, 16, 17, 18)
"""A greeting, and the frames of a snapshot: a stream loses no byte while it stands, and a snapshot
relies on that, other than by starting again after ten seconds."""
RETRY_S = 0.25
PART_BYTES = 1 << 10
"""What arrives at once on a slow connection."""
BACKLOG_S = 0.2
"""So long may bytes be under way on a connection that is slow no more."""


class NetworkEvents(Protocol):
    """Who watches the network."""

    def crash_point(self, life: Life, kind: str) -> None: ...

    def sent(self, source: str, target: str, data: bytes, fault: str) -> None: ...

    def count(self, name: str) -> None: ...


class Conditions:
    """What the network does to frames; probabilities per frame, delays in seconds. `bytes_per_s` is
    what one direction of a connection carries."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.duplication = 0.0
        self.spike = 0.0
        self.spike_s = 0.05
        self.base_s = 0.0005
        self.jitter_s = 0.002
        self.bytes_per_s = math.inf


class HostNames:
    """Hosts are dialled by their names."""

    async def addresses(self, host: str) -> list[str]:
        return [host]


class Endpoint:
    """One end of a connection, as the asyncio transport of its protocol."""

    def __init__(self, network: Network, life: Life, peer_name: str) -> None:
        self._network = network
        self.life = life
        self.peer_name = peer_name
        self.protocol: Any = None
        self.other: Endpoint | None = None
        self.closed = False
        self.free_at = 0.0
        self.last_arrival = 0.0
        self.held: list[bytes | None] = []
        self.early: list[bytes | None] = []

    def attach(self, protocol: Any) -> None:
        """The process takes the connection; what has arrived since it was accepted follows."""
        self.protocol = protocol
        protocol.connection_made(self)
        early, self.early = self.early, []
        for data in early:
            self._network.take(self, data)

    def write(self, data: bytes) -> None:
        self._network.transmit(self, data)

    def abort(self) -> None:
        self._network.abort(self)

    close = abort

    def shutdown(self, how: int) -> None:
        """As of the socket; nothing follows from it before a protocol is there to learn of it."""
        if self.protocol is not None:
            self.abort()

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return sum(len(data) for data in self.held if data)


class SimListener(Listener):
    """Accepts what is dialled in the simulated network: `Endpoint`s in place of sockets."""

    async def open(self, host: str, port: int) -> int:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, SimLoop) or loop.life is None:
            raise NotImplementedError("only a simulated process listens here")
        self._network: Network = loop.connector
        self._network.listen(loop.life, self._on_accepted, host)
        self._host = host
        return port

    def close(self) -> None:
        self._network.listeners.pop(self._host, None)


class Network:
    """All connections of a run. Host names are node names."""

    def __init__(self, loop: SimLoop, events: NetworkEvents,
                 streams: Callable[[str], random.Random]) -> None:
        self._loop = loop
        self._events = events
        self._streams = streams
        self._generators: dict[tuple[str, str], random.Random] = {}
        self.conditions = Conditions()
        self.listeners: dict[str, tuple[Life, Callable[[Any], None]]] = {}
        self.blocked: set[tuple[str, str]] = set()
        self.endpoints: list[Endpoint] = []
        self._sent = 0
        self._latest: dict[str, int] = {}

    def _generator(self, source: str, target: str) -> random.Random:
        found = self._generators.get((source, target))
        if found is None:
            found = self._generators[(source, target)] = self._streams(f"link/{source}/{target}")
        return found

    def _delay(self, source: str, target: str) -> float:
        generator = self._generator(source, target)
        conditions = self.conditions
        delay = conditions.base_s + conditions.jitter_s * generator.random()
        if conditions.spike and generator.random() < conditions.spike:
            self._events.count("delay")
            delay += conditions.spike_s * generator.random()
        return delay

    # --- connecting -----------------------------------------------------------------------------

    def listen(self, life: Life, on_accepted: Callable[[Any], None], host: str) -> None:
        """From now on `on_accepted` is given the `Endpoint` of whoever dials `host`."""
        self.listeners[host] = (life, on_accepted)
        life.on_death.append(lambda: self._died(life))

    async def connect(self, life: Life, factory: Callable[[], Any], host: str,
                      port: int) -> tuple[Endpoint, Any]:
        """`loop.create_connection`: refused without a listener, silent through a cut."""
        while (life.name, host) in self.blocked or (host, life.name) in self.blocked:
            await asyncio.sleep(RETRY_S)
        await asyncio.sleep(self._delay(life.name, host) + self._delay(host, life.name))
        listener = self.listeners.get(host)
        if listener is None or not listener[0].alive:
            raise ConnectionRefusedError(f"{host} does not listen")
        near, far = Endpoint(self, life, host), Endpoint(self, listener[0], life.name)
        near.other, far.other = far, near
        self.endpoints += (near, far)
        self._loop.schedule(far.life, self._loop.now, listener[1], far)
        near.attach(factory())
        return near, near.protocol

    # --- sending --------------------------------------------------------------------------------

    def transmit(self, source: Endpoint, data: bytes) -> None:
        """Bytes were written at `source`."""
        source.life.require_alive()
        if source.closed:
            return
        self._notice_restart(source)
        self._events.crash_point(source.life, "send")
        data = self._disturb(source, data)
        if data:
            if (source.life.name, source.peer_name) in self.blocked:
                source.held.append(data)
            else:
                self._schedule(source, data)
        self._events.crash_point(source.life, "send")

    def _disturb(self, source: Endpoint, data: bytes) -> bytes:
        """Lose and double whole frames."""
        conditions = self.conditions
        names = source.life.name, source.peer_name
        if not conditions.loss and not conditions.duplication:
            self._events.sent(*names, data, "")
            return data
        generator = self._generator(*names)
        kept: list[bytes] = []
        for body in _frames(data):
            tag = body[HEADER_BYTES + 1]
            draw = generator.random()
            if draw < conditions.loss and tag not in NEVER_LOST:
                self._events.sent(*names, body, "lost")
                continue
            kept.append(body)
            self._events.sent(*names, body, "")
            if draw > 1.0 - conditions.duplication and tag not in (
                    HELLO_TAG, REQUEST_TAG, RESPONSE_TAG):
                self._events.sent(*names, body, "doubled")
                kept.append(body)
        return b"".join(kept)

    def _schedule(self, source: Endpoint, data: bytes | None) -> None:
        names, target = (source.life.name, source.peer_name), source.other
        for part in self._parts(data):
            source.free_at = max(source.free_at, self._loop.now) \
                + len(part or b"") / self.conditions.bytes_per_s
            source.last_arrival = max(source.last_arrival, source.free_at + self._delay(*names))
            if target is not None:
                self._sent += 1
                self._loop.schedule(target.life, source.last_arrival, self._arrive, target, part,
                                    self._sent)

    def _parts(self, data: bytes | None) -> list[bytes | None]:
        if data is None or self.conditions.bytes_per_s == math.inf:
            return [data]
        return [data[offset:offset + PART_BYTES] for offset in range(0, len(data), PART_BYTES)]

    def _arrive(self, target: Endpoint, data: bytes | None, number: int) -> None:
        """What was sent as the `number`-th reaches a node; earlier ones of others may follow."""
        name = target.life.name
        if number < self._latest.get(name, 0):
            self._events.count("reordered")
        else:
            self._latest[name] = number
        if target.protocol is None:
            target.early.append(data)
        else:
            self.take(target, data)

    def take(self, target: Endpoint, data: bytes | None) -> None:
        """The process reads what has arrived, or that the connection is gone."""
        if target.closed:
            return
        if data is None:
            self._lost(target)
        else:
            if target.other is not None and target.other.closed and target.other.life.alive:
                self._events.count("late bytes")
            target.protocol.data_received(data)

    # --- ends -----------------------------------------------------------------------------------

    def abort(self, endpoint: Endpoint) -> None:
        """The process closes its end; the other end learns of it behind what is under way."""
        if endpoint.closed:
            return
        if endpoint.life.alive:
            self._loop.schedule(endpoint.life, self._loop.now, endpoint.protocol.connection_lost,
                                None)
        self._close(endpoint)
        self._notify_other(endpoint)

    def _notify_other(self, endpoint: Endpoint) -> None:
        if (endpoint.life.name, endpoint.peer_name) in self.blocked:
            endpoint.held.append(None)
        else:
            self._schedule(endpoint, None)

    def _close(self, endpoint: Endpoint) -> None:
        endpoint.closed = True
        if not endpoint.held and endpoint in self.endpoints:
            self.endpoints.remove(endpoint)

    def _lost(self, endpoint: Endpoint) -> None:
        """The end learns that the connection is gone."""
        self._close(endpoint)
        if endpoint.life.alive and endpoint.protocol is not None:
            endpoint.protocol.connection_lost(ConnectionResetError("reset"))

    def _died(self, life: Life) -> None:
        """A process ended: its host resets its connections, or was silent because it lost power."""
        if self.listeners.get(life.name, (None,))[0] is life:
            del self.listeners[life.name]
        silent = self._generator(life.name, "death").random() < 0.5
        for endpoint in [e for e in self.endpoints if e.life is life]:
            self._close(endpoint)
            if not silent:
                self._notify_other(endpoint)

    def _notice_restart(self, source: Endpoint) -> None:
        """A host that runs again resets the connections of its former process."""
        target, listener = source.other, self.listeners.get(source.peer_name)
        if target is not None and not target.life.alive and listener is not None \
                and listener[0] is not target.life:
            delay = self._delay(source.peer_name, source.life.name)
            self._loop.schedule(source.life, self._loop.now + delay, self._lost_once, source)

    def reset(self, first: str, second: str, late_s: float) -> bool:
        """Break the connection of two nodes: `first` learns it now, `second` after `late_s`, and
        until then what `first` had sent still arrives there."""
        for endpoint in self.endpoints:
            if endpoint.life.name == first and endpoint.peer_name == second \
                    and not endpoint.closed:
                self._break(endpoint, late_s)
                return True
        return False

    def _break(self, endpoint: Endpoint, late_s: float) -> None:
        """The connection of `endpoint` is lost: there now, at its other end after `late_s`."""
        other = endpoint.other
        self._loop.schedule(endpoint.life, self._loop.now, self._lost_once, endpoint)
        if other is not None:
            self._loop.schedule(other.life, self._loop.now + late_s, self._lost_once, other)

    def widen(self) -> None:
        """Connections are slow no more. What would still be under way for long is lost with its
        connection, at both ends."""
        if self.conditions.bytes_per_s == math.inf:
            return
        self.conditions.bytes_per_s = math.inf
        for endpoint in self.endpoints:
            if not endpoint.closed and endpoint.last_arrival > self._loop.now + BACKLOG_S:
                self._events.count("backlog lost")
                self._break(endpoint, 0.0)

    def _lost_once(self, endpoint: Endpoint) -> None:
        if not endpoint.closed:
            self._lost(endpoint)

    # --- partitions -----------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Nothing passes from `source` to `target`."""
        self.blocked.add((source, target))

    def heal(self, pairs: set[tuple[str, str]] | None = None) -> None:
        """Everything passes again (or the given directions); what was held is sent now."""
        healed = sorted(self.blocked if pairs is None else self.blocked & pairs)
        self.blocked.difference_update(healed)
        for source, target in healed:
            for endpoint in [e for e in self.endpoints
                             if e.life.name == source and e.peer_name == target]:
                held, endpoint.held = endpoint.held, []
                for data in held:
                    self._schedule(endpoint, data)
                if endpoint.closed and endpoint in self.endpoints:
                    self.endpoints.remove(endpoint)


def _frames(data: bytes) -> list[bytes]:
    """Cut written bytes into frames; the transport writes whole ones."""
    frames = []
    offset = 0
    while offset < len(data):
        end = offset + HEADER_BYTES + int.from_bytes(data[offset:offset + HEADER_BYTES], "big")
        frames.append(data[offset:end])
        offset = end
    return frames
