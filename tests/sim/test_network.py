"""The fake network: streams in order, cuts that hold bytes back, resets learned of late."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from elastickv.raft.frames import frame
from tests.sim.loop import Life, SimLoop
from tests.sim.network import Endpoint, Network
from tests.sim.random_streams import Streams


class Watcher:
    """Network events nobody needs here."""

    def crash_point(self, life: Life, kind: str) -> None: ...

    def sent(self, source: str, target: str, data: bytes, fault: str) -> None: ...

    def count(self, name: str) -> None: ...


class Peer:
    """A protocol that remembers what it got."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.lost_at: float | None = None

    def connection_made(self, transport: Endpoint) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost_at = asyncio.get_running_loop().time()


Scenario = Callable[[SimLoop, Network, Peer, Peer], Awaitable[None]]


def run(scenario: Scenario) -> None:
    loop = SimLoop()
    network = Network(loop, Watcher(), Streams(0).stream)
    loop.connector = network
    near, far = Peer(), Peer()

    async def main() -> None:
        first, second = Life("n1"), Life("n2")
        network.listen(second, lambda endpoint: endpoint.attach(far), "n2")
        await network.connect(first, lambda: near, "n2", 1)
        await asyncio.sleep(0.01)
        await scenario(loop, network, near, far)

    loop.run(main())


FRAMES = [frame(bytes((0x92, 2, number))) for number in range(20)]


def test_bytes_arrive_in_order() -> None:
    async def scenario(loop: SimLoop, network: Network, near: Peer, far: Peer) -> None:
        network.conditions.spike = 0.5
        for data in FRAMES:
            near.transport.write(data)
        await asyncio.sleep(1.0)
        assert b"".join(far.received) == b"".join(FRAMES)

    run(scenario)


@pytest.mark.parametrize(("loss", "duplication"), [(1.0, 0.0), (0.0, 1.0)])
def test_whole_frames_are_lost_and_doubled(loss: float, duplication: float) -> None:
    async def scenario(loop: SimLoop, network: Network, near: Peer, far: Peer) -> None:
        network.conditions.loss, network.conditions.duplication = loss, duplication
        near.transport.write(FRAMES[0] + FRAMES[1])
        await asyncio.sleep(1.0)
        assert b"".join(far.received) == (b"" if loss else (FRAMES[0] * 2 + FRAMES[1] * 2))

    run(scenario)


def test_a_cut_holds_back_one_direction_until_it_heals() -> None:
    async def scenario(loop: SimLoop, network: Network, near: Peer, far: Peer) -> None:
        network.cut("n1", "n2")
        near.transport.write(FRAMES[0])
        far.transport.write(FRAMES[1])
        await asyncio.sleep(1.0)
        assert (far.received, near.received) == ([], [FRAMES[1]])
        network.heal()
        await asyncio.sleep(1.0)
        assert far.received == [FRAMES[0]]

    run(scenario)


def test_bytes_arrive_at_the_end_that_does_not_know_of_a_reset_yet() -> None:
    async def scenario(loop: SimLoop, network: Network, near: Peer, far: Peer) -> None:
        near.transport.write(FRAMES[0])
        assert network.reset("n1", "n2", late_s=0.5)
        await asyncio.sleep(0.1)
        assert near.lost_at is not None
        assert far.received == [FRAMES[0]]
        assert far.lost_at is None
        await asyncio.sleep(1.0)
        assert far.lost_at is not None

    run(scenario)


def test_a_slow_connection_delivers_in_parts_and_in_order() -> None:
    async def scenario(loop: SimLoop, network: Network, near: Peer, far: Peer) -> None:
        network.conditions.bytes_per_s = 10_000.0
        large = frame(bytes((0x92, 2)) + bytes(10_000))
        near.transport.write(FRAMES[0])
        near.transport.write(large)
        await asyncio.sleep(0.5)
        received = b"".join(far.received)
        assert 4_000 < len(received) < 6_000
        assert (FRAMES[0] + large).startswith(received)
        near.transport.abort()
        await asyncio.sleep(1.0)
        assert b"".join(far.received) == FRAMES[0] + large
        assert far.lost_at is not None

    run(scenario)


def test_nobody_listens_on_a_dead_node() -> None:
    async def scenario(loop: SimLoop, network: Network, near: Peer, far: Peer) -> None:
        far.transport.life.end()
        with pytest.raises(ConnectionRefusedError):
            await network.connect(Life("n3"), Peer, "n2", 1)

    run(scenario)
