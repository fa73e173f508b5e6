"""Both network drivers: what a cut, a shape and a healing do to real connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from jepsen.faults.network import both_ways, halves, ring_cuts
from jepsen.network import Link, LinkShape, Unsupported, links_between, namespaces
from jepsen.network.namespaces import (
    NamespaceNetwork,
    namespaces_work,
    refused_packets,
    require_connection,
    run_command,
    shape_commands,
    shaped_packets,
)
from jepsen.network.proxy import ProxyNetwork

NODES = ["n1", "n2", "n3"]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class EchoNode:
    """Answers each line with the same line."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while line := await reader.readline():
            self.lines.append(line)
            writer.write(line)
        writer.close()


@pytest.fixture
async def network() -> AsyncIterator[tuple[ProxyNetwork, dict[str, EchoNode]]]:
    proxy = ProxyNetwork(seed=1)
    await proxy.start(NODES)
    echoes = {node: EchoNode() for node in NODES}
    servers = [await asyncio.start_server(echoes[node].serve,
                                          *proxy.raft_listen_address(node).split(":"))
               for node in NODES]
    yield proxy, echoes
    for server in servers:
        server.close()
    await proxy.stop()


async def dial(proxy: ProxyNetwork, source: str, target: str) -> Connection:
    own_host = proxy.raft_listen_address(source).split(":")[0]
    return await asyncio.open_connection(*proxy.raft_address(target).split(":"),
                                         local_addr=(own_host, 0))


async def ask(connection: Connection, line: bytes = b"hello\n") -> bytes:
    connection[1].write(line)
    return await asyncio.wait_for(connection[0].readline(), 5)


async def is_silent(connection: Connection, line: bytes = b"hello\n") -> bool:
    connection[1].write(line)
    try:
        await asyncio.wait_for(connection[0].readline(), 0.3)
    except TimeoutError:
        return True
    return False


async def test_traffic_passes(network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, echoes = network
    connection = await dial(proxy, "n1", "n2")
    assert await ask(connection) == b"hello\n"
    big = b"x" * 60_000 + b"\n"
    assert await ask(connection, big) == big
    assert (echoes["n2"].connections, echoes["n3"].connections) == (1, 0)


async def test_a_cut_holds_bytes_until_it_heals(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, echoes = network
    connection = await dial(proxy, "n1", "n2")
    await ask(connection, b"before\n")
    await proxy.cut([Link("n1", "n2")])
    assert await is_silent(connection, b"held\n")
    assert echoes["n2"].lines == [b"before\n"]
    await proxy.heal()
    assert await asyncio.wait_for(connection[0].readline(), 5) == b"held\n"


async def test_a_one_way_cut_lets_the_other_direction_through(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, echoes = network
    connection = await dial(proxy, "n1", "n2")
    await ask(connection, b"before\n")
    await proxy.cut([Link("n2", "n1")])
    assert await is_silent(connection, b"heard\n")
    assert echoes["n2"].lines == [b"before\n", b"heard\n"]
    other = await dial(proxy, "n1", "n3")
    assert await ask(other) == b"hello\n"


async def test_a_new_connection_does_not_reach_over_a_cut(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, echoes = network
    await proxy.cut([Link("n2", "n1")])
    given_up = await dial(proxy, "n1", "n2")
    assert await is_silent(given_up)
    given_up[1].close()
    await given_up[1].wait_closed()
    patient = await dial(proxy, "n1", "n2")
    assert await is_silent(patient, b"patient\n")
    assert echoes["n2"].connections == 0
    await proxy.heal()
    assert await asyncio.wait_for(patient[0].readline(), 5) == b"patient\n"
    assert echoes["n2"].lines == [b"patient\n"]


async def test_the_end_of_a_connection_passes_on(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, _ = network
    connection = await dial(proxy, "n1", "n2")
    await ask(connection)
    connection[1].write_eof()
    assert await asyncio.wait_for(connection[0].read(), 5) == b""


async def test_latency_and_loss_delay_but_keep_order(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, _ = network
    connection = await dial(proxy, "n1", "n2")
    await ask(connection)
    await proxy.shape([Link("n1", "n2")], LinkShape(latency_ms=60, jitter_ms=30))
    begin = time.monotonic()
    lines = [b"%d\n" % number for number in range(20)]
    for line in lines:
        connection[1].write(line)
        await asyncio.sleep(0.001)
    answers = [await asyncio.wait_for(connection[0].readline(), 10) for _ in lines]
    assert answers == lines
    # Never less than the least of twenty draws could be; a slow machine can only make it more.
    assert time.monotonic() - begin > 0.02


async def test_a_narrow_link_passes_on_bit_by_bit_until_it_heals(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, _ = network
    connection = await dial(proxy, "n1", "n2")
    await ask(connection)
    await proxy.shape([Link("n2", "n1")], LinkShape(rate_kbit_s=400))
    line = b"x" * 20_000 + b"\n"
    begin = time.monotonic()
    connection[1].write(line)
    first = await asyncio.wait_for(connection[0].readexactly(1), 10)
    assert 0 < len(connection[0]._buffer) < len(line)  # type: ignore[attr-defined]
    assert first + await asyncio.wait_for(connection[0].readline(), 10) == line
    assert time.monotonic() - begin > 20_000 * 8 / 400_000 * 0.9
    # Both connections share the link: together they would take 16 seconds.
    await proxy.shape([Link("n2", "n1")], LinkShape(rate_kbit_s=20))
    other = await dial(proxy, "n1", "n2")
    for each in (connection, other):
        assert await is_silent(each, line)
    assert await proxy.effect() > 0
    await proxy.heal()
    for each in (connection, other):
        assert await asyncio.wait_for(each[0].readline(), 5) == line


async def test_a_node_that_is_down_refuses(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy = ProxyNetwork(seed=2)
    await proxy.start(["a", "b"])
    reader, _ = await dial(proxy, "a", "b")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    await proxy.stop()


async def test_what_a_cut_or_a_shape_touched_is_counted_until_it_heals(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, _ = network
    connection = await dial(proxy, "n1", "n2")
    await ask(connection)
    await proxy.cut([Link("n2", "n3")])
    await ask(connection)
    assert await proxy.effect() == 0
    await proxy.cut([Link("n1", "n2")])
    assert await is_silent(connection)
    assert await proxy.effect() > 0
    await proxy.heal()
    assert await proxy.effect() == 0
    await proxy.shape([Link("n1", "n2")], LinkShape(latency_ms=1))
    assert await asyncio.wait_for(connection[0].readline(), 5) == b"hello\n"
    await ask(connection)
    assert await proxy.effect() > 0


async def test_a_stranger_is_not_let_through(
        network: tuple[ProxyNetwork, dict[str, EchoNode]]) -> None:
    proxy, echoes = network
    reader, _ = await asyncio.open_connection(*proxy.raft_address("n1").split(":"))
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert echoes["n1"].connections == 0


# --- who is cut from whom --------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 5])
def test_halves_are_a_majority_and_the_rest(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    for seed in range(20):
        left, right = halves(nodes, random.Random(seed))
        assert sorted(left + right) == nodes
        assert len(left) > len(right) >= 1
        assert both_ways(left, right) == links_between(left, right) | links_between(right, left)


def test_in_a_ring_of_five_everybody_sees_a_majority_and_no_two_the_same() -> None:
    circle = ["a", "b", "c", "d", "e"]
    cuts = ring_cuts(circle)
    views = {node: frozenset(other for other in circle
                             if other == node or Link(node, other) not in cuts)
             for node in circle}
    assert all(len(view) == 3 for view in views.values())
    assert len(set(views.values())) == 5
    assert cuts == {Link(link.target, link.source) for link in cuts}


def test_in_a_ring_of_three_each_sends_to_the_next_only() -> None:
    assert ring_cuts(["a", "b", "c"]) == {Link("a", "c"), Link("b", "a"), Link("c", "b")}


# --- namespaces ------------------------------------------------------------------------------


def test_shaping_is_one_queue_per_destination() -> None:
    commands = shape_commands([("10.0.0.2", LinkShape(50, 5, 0.1)),
                               ("10.0.0.3", LinkShape(20, rate_kbit_s=64))])
    assert [" ".join(command) for command in commands] == [
        "tc qdisc add dev eth0 root handle 1: prio bands 5",
        "tc qdisc add dev eth0 parent 1:4 netem delay 50ms 5ms loss 10%",
        "tc filter add dev eth0 parent 1: protocol ip u32 match ip dst 10.0.0.2/32 flowid 1:4",
        "tc qdisc add dev eth0 parent 1:5 netem delay 20ms 0ms loss 0% rate 64kbit",
        "tc filter add dev eth0 parent 1: protocol ip u32 match ip dst 10.0.0.3/32 flowid 1:5"]


def test_queues_of_many_destinations_are_named_as_tc_reads_them() -> None:
    """Both halves of a class id are hexadecimal (tc(8), "CLASSES")."""
    commands = shape_commands([(f"10.0.0.{number}", LinkShape(50)) for number in range(2, 10)])
    words = [word for command in commands for word in command]
    assert words[words.index("bands") + 1] == "11"
    for option in ("parent", "flowid"):
        named = [words[place + 1] for place, word in enumerate(words) if word == option]
        assert [each for each in named if each != "1:"] == [
            "1:4", "1:5", "1:6", "1:7", "1:8", "1:9", "1:a", "1:b"]


def test_the_kernels_counters_are_read() -> None:
    snmp = ("Ip: Forwarding InReceives OutNoRoutes ReasmTimeout\nIp: 1 99 7 0\n"
            "Icmp: InMsgs\nIcmp: 3\n")
    assert refused_packets(snmp) == 7
    qdiscs = ('[{"kind":"prio","handle":"1:","packets":50,"drops":2},'
              '{"kind":"netem","handle":"8001:","packets":20,"drops":3},'
              '{"kind":"netem","handle":"8002:","packets":1}]')
    assert shaped_packets(qdiscs) == 24
    assert shaped_packets("") == 0


_SEND = """
import socket, sys
channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    channel.sendto(b"ping", (sys.argv[1], 9))
except OSError as error:
    sys.exit(f"refused: {error}")
"""


async def can_send(network: NamespaceNetwork, link: Link) -> bool:
    """Whether a packet leaves `source` for `target`."""
    address = network.raft_address(link.target).partition(":")[0]
    process = await asyncio.create_subprocess_exec(
        *network.launch_prefix(link.source), sys.executable, "-c", _SEND, address,
        stderr=asyncio.subprocess.DEVNULL)
    return await process.wait() == 0


class Machine:
    """Answers `ip` as a machine does that has some names and routes already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, taken: Sequence[str] = (),
                 routes: Sequence[str] = ()) -> None:
        self.there = set(taken)
        self.routes = routes
        self.commands: list[str] = []
        self.refused = ""
        monkeypatch.setattr(namespaces, "run_command", self.run)
        monkeypatch.setattr(namespaces.os, "geteuid", lambda: 0)

    async def run(self, *command: str, check: bool = True) -> str:
        await asyncio.sleep(0)
        self.commands.append(" ".join(command))
        if self.refused and self.refused in self.commands[-1]:
            raise Unsupported("not permitted")
        match command:
            case ("ip", "route", "show", "root", subnet):
                return "\n".join(route for route in self.routes if route == subnet)
            case ("ip", ("link" | "netns"), "add", name, *_):
                if name in self.there:
                    raise Unsupported(f"{name}: File exists")
                self.there.add(name)
            case ("ip", ("link" | "netns"), "del", name):
                self.there.remove(name)
        return ""


def first_subnet(monkeypatch: pytest.MonkeyPatch) -> int:
    """Which one a network draws where all are free."""
    with monkeypatch.context() as patch:
        Machine(patch)
        network = NamespaceNetwork(seed=7)
        asyncio.run(network.start(NODES))
        return int(network.raft_address("n1").split(".")[1])


@pytest.mark.parametrize(("taken", "routes"), [
    pytest.param(["jpbr{}"], [], id="the bridge of another run"),
    pytest.param(["jp{}n2"], [], id="a namespace that was left over"),
    pytest.param(["jpv{}x3"], [], id="an interface that was left over"),
    pytest.param([], ["10.{}.0.0/24"], id="a route to somewhere else"),
])
def test_a_subnet_that_is_taken_is_left_alone_and_another_one_drawn(
        monkeypatch: pytest.MonkeyPatch, taken: list[str], routes: list[str]) -> None:
    subnet = first_subnet(monkeypatch)
    others = [name.format(subnet) for name in taken]
    machine = Machine(monkeypatch, taken=others, routes=[route.format(subnet) for route in routes])
    network = NamespaceNetwork(seed=7)
    asyncio.run(network.start(NODES))
    assert not network.raft_address("n1").startswith(f"10.{subnet}.")
    assert len(machine.there) == len(others) + 1 + 2 * len(NODES)
    asyncio.run(network.stop())
    assert machine.there == set(others)


def test_a_machine_that_refuses_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.refused = "netns exec"
    network = NamespaceNetwork(seed=7)
    with pytest.raises(Unsupported, match="not permitted"):
        asyncio.run(network.start(NODES))
    assert machine.there == set()
    asyncio.run(network.stop())


def test_a_machine_on_which_nothing_is_free_is_not_asked_for_ever(
        monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, taken=[f"jpbr{subnet}" for subnet in range(256)])
    before = set(machine.there)
    with pytest.raises(Unsupported, match="File exists"):
        asyncio.run(NamespaceNetwork(seed=7).start(NODES))
    assert machine.there == before


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_a_start_that_is_interrupted_leaves_nothing_behind(
        monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    machine = Machine(monkeypatch)

    async def main() -> None:
        network = NamespaceNetwork(seed=7)
        start = asyncio.ensure_future(network.start(NODES))
        for _ in range(steps):
            await asyncio.sleep(0)
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await start
        await network.stop()

    asyncio.run(main())
    assert machine.there == set()


@pytest.mark.parametrize("steps", range(0, 40, 2))
def test_a_trial_that_is_interrupted_leaves_nothing_behind(
        monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    machine = Machine(monkeypatch)
    machine.refused = "tc qdisc add"

    async def main() -> None:
        trial = asyncio.ensure_future(namespaces_work())
        for number in range(2 * steps):
            if number in (steps, steps + 5):
                trial.cancel()
            await asyncio.sleep(0)
        with contextlib.suppress(asyncio.CancelledError):
            assert await trial == "not permitted"

    asyncio.run(main())
    assert machine.there == set()


async def test_a_command_is_not_interrupted_with_the_run() -> None:
    script = "import os; print(os.getpgrp() == os.getpid())"
    assert await run_command(sys.executable, "-c", script) == "True"


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
async def test_two_networks_of_one_seed_leave_each_other_alone() -> None:
    first, second = NamespaceNetwork(seed=5), NamespaceNetwork(seed=5)
    await first.start(["a", "b"])
    try:
        await second.start(["a", "b"])
        await second.stop()
        assert await can_send(first, Link("a", "b"))
    finally:
        await first.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
async def test_namespaces_cut_one_way_and_heal() -> None:
    network = NamespaceNetwork(seed=3)
    await network.start(["a", "b"])
    try:
        there, back = Link("a", "b"), Link("b", "a")
        assert [await can_send(network, link) for link in (there, back)] == [True, True]
        await network.cut([there])
        assert [await can_send(network, link) for link in (there, back)] == [False, True]
        await network.effect()
        await network.heal()
        assert await network.effect() == 0
        assert [await can_send(network, link) for link in (there, back)] == [True, True]
        before = await run_command("ip", "netns", "list")
    finally:
        await network.stop()
    left = await run_command("ip", "netns", "list")
    assert set(left.splitlines()) < set(before.splitlines())


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.parametrize("cut", [
    pytest.param(Link("a", "b"), id="what is sent"),
    pytest.param(Link("b", "a"), id="the answers")])
async def test_namespaces_without_connections_are_no_network(
        cut: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NamespaceNetwork(seed=4)
    await network.start(["a", "b"])
    try:
        await require_connection(network, "a", "b")
        await network.cut([cut])
        monkeypatch.setattr(namespaces, "CONNECT_TIMEOUT_S", 0.2)
        with pytest.raises(Unsupported, match=r"no connection from the namespace of a to the "
                                              r"namespace of b: .*Error"):
            await require_connection(network, "a", "b")
    finally:
        await network.stop()
