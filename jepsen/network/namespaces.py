"""A network namespace per node: veth pairs into one bridge, routes and `tc netem` for faults.

    root namespace            namespace jp<run>n1          namespace jp<run>n2
    bridge 10.<x>.0.254/24 -- veth 10.<x>.0.1/24           veth 10.<x>.0.2/24

A cut link is a blackhole route in the sender's namespace, so it works in one direction, for every
kind of packet, and for connections that stand. Shaping is one `netem` queue per destination behind
a `prio` queue, chosen by a `u32` filter. Needs root; shaping needs `sch_netem` in the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from collections.abc import Iterable, Sequence

from jepsen.interrupts import to_the_end
from jepsen.network.api import Link, LinkShape, Unsupported

CLIENT_PORT = 7050
RAFT_PORT = 7150
DEVICE = "eth0"
SUBNETS_TRIED = 10
TAKEN = "File exists"
"""What `ip` says of a name that somebody has."""
MAX_NODES = 9
"""One band of the `prio` queue (at most 16) per destination, besides the default ones."""

CONNECT_TIMEOUT_S = 5.0
# It ends with its standard input.
_LISTEN = ("import socket, sys; listening = socket.create_server((sys.argv[1], int(sys.argv[2]))); "
           "print('ready', flush=True); sys.stdin.read()")
_CONNECT = ("import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), "
            "float(sys.argv[3]))")


def shape_commands(destinations: Sequence[tuple[str, LinkShape]]) -> list[list[str]]:
    """The `tc` commands, to be run in the sender's namespace, that shape what it sends to each
    address. An existing set-up must have been deleted."""
    bands = len(destinations) + 3
    commands = [["tc", "qdisc", "add", "dev", DEVICE, "root", "handle", "1:", "prio", "bands",
                 str(bands)]]
    for band, (address, shape) in enumerate(destinations, start=4):
        queue = f"1:{band:x}"  # hexadecimal, unlike the number of bands (tc(8))
        commands.append(["tc", "qdisc", "add", "dev", DEVICE, "parent", queue, "netem",
                         "delay", f"{shape.latency_ms:g}ms", f"{shape.jitter_ms:g}ms",
                         "loss", f"{shape.loss * 100:g}%",
                         *(["rate", f"{shape.rate_kbit_s:.0f}kbit"] if shape.is_narrow else [])])
        commands.append(["tc", "filter", "add", "dev", DEVICE, "parent", "1:", "protocol", "ip",
                         "u32", "match", "ip", "dst", f"{address}/32", "flowid", queue])
    return commands


def refused_packets(snmp: str) -> int:
    """How many packets found no route, from the text of /proc/net/snmp; a blackhole is none."""
    names, counts = (line.split()[1:] for line in snmp.splitlines() if line.startswith("Ip:"))
    return int(dict(zip(names, counts, strict=True))["OutNoRoutes"])


def shaped_packets(qdiscs: str) -> int:
    """How many packets passed through or were lost in `netem`, from `tc -s -j qdisc show`."""
    return sum(qdisc.get("packets", 0) + qdisc.get("drops", 0)
               for qdisc in json.loads(qdiscs or "[]") if qdisc.get("kind") == "netem")


async def run_command(*command: str, check: bool = True) -> str:
    """Run a command; its output. Raises `Unsupported` with what it said when it fails."""
    try:
        # A terminal interrupts whole process groups, and the commands that clean up with them.
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True)
    except FileNotFoundError:
        raise Unsupported(f"{command[0]} is not installed (run jepsen/install.sh)") from None
    output = (await process.communicate())[0].decode(errors="replace").strip()
    if check and process.returncode:
        raise Unsupported(f"`{' '.join(command)}`: {output}")
    return output


class NamespaceNetwork:
    """Real interfaces and real packet loss. `seed` only picks a free subnet.

    Other runs may have theirs: what this one did not make it does not touch.
    """

    name = "namespaces"

    def __init__(self, seed: int = 0) -> None:
        self._subnets = random.Random(f"{seed} {os.getpid()}").sample(
            range(16, 240), SUBNETS_TRIED)
        self._subnet = self._subnets[0]
        self._numbers: dict[str, int] = {}
        self._undo: list[tuple[str, ...]] = []
        """The commands that take away what was made, in the order of making."""
        self._starting: asyncio.Future[None] | None = None
        self._shapes: dict[Link, LinkShape] = {}
        self._refused_before = 0

    @property
    def _bridge(self) -> str:
        return f"jpbr{self._subnet}"

    def _namespace(self, node: str) -> str:
        return f"jp{self._subnet}{node}"

    def _outside(self, node: str) -> str:
        """The end of the node's veth pair that is in the root namespace."""
        return f"jpv{self._subnet}x{self._numbers[node]}"

    def _address(self, node: str) -> str:
        return f"10.{self._subnet}.0.{self._numbers[node]}"

    async def start(self, nodes: Sequence[str]) -> None:
        if os.geteuid() != 0:
            raise Unsupported("network namespaces need root")
        if len(nodes) > MAX_NODES:
            raise Unsupported(f"at most {MAX_NODES} nodes")
        self._numbers = {node: number for number, node in enumerate(nodes, start=1)}
        # To its end also when interrupted: what a command makes must not be made after `stop`.
        self._starting = asyncio.ensure_future(self._set_up_somewhere(nodes))
        await asyncio.shield(self._starting)

    async def _set_up_somewhere(self, nodes: Sequence[str]) -> None:
        for subnet in self._subnets:
            self._subnet = subnet
            try:
                await self._set_up(nodes)
                return
            except Unsupported as error:
                await self._take_down()
                if TAKEN not in str(error) or subnet == self._subnets[-1]:
                    raise

    async def _set_up(self, nodes: Sequence[str]) -> None:
        subnet = f"10.{self._subnet}.0.0/24"
        if routes := await run_command("ip", "route", "show", "root", subnet):
            raise Unsupported(f"{TAKEN}: a route to {subnet}: {routes}")
        await self._make("link", self._bridge, "type", "bridge")
        await run_command("ip", "addr", "add", f"10.{self._subnet}.0.254/24", "dev", self._bridge)
        await run_command("ip", "link", "set", self._bridge, "up")
        for node in nodes:
            await self._add_namespace(node)

    async def _make(self, kind: str, name: str, *how: str) -> None:
        await run_command("ip", kind, "add", name, *how)
        self._undo.append(("ip", kind, "del", name))

    async def _add_namespace(self, node: str) -> None:
        namespace = self._namespace(node)
        outside = self._outside(node)
        await self._make("netns", namespace)
        await self._make("link", outside, "type", "veth", "peer", "name", DEVICE,
                         "netns", namespace)
        await run_command("ip", "link", "set", outside, "master", self._bridge, "up")
        await self._inside(node, "ip", "addr", "add", f"{self._address(node)}/24", "dev", DEVICE)
        await self._inside(node, "ip", "link", "set", DEVICE, "up")
        await self._inside(node, "ip", "link", "set", "lo", "up")

    async def _inside(self, node: str, *command: str, check: bool = True) -> str:
        return await run_command(*self.launch_prefix(node), *command, check=check)

    def client_address(self, node: str) -> str:
        return f"{self._address(node)}:{CLIENT_PORT}"

    def raft_address(self, node: str) -> str:
        return f"{self._address(node)}:{RAFT_PORT}"

    def raft_listen_address(self, node: str) -> str:
        return self.raft_address(node)

    def launch_prefix(self, node: str) -> list[str]:
        return ["ip", "netns", "exec", self._namespace(node)]

    async def cut(self, links: Iterable[Link]) -> None:
        for link in links:
            await self._inside(link.source, "ip", "route", "replace", "blackhole",
                               f"{self._address(link.target)}/32")

    async def shape(self, links: Iterable[Link], shape: LinkShape) -> None:
        changed = list(links)
        self._shapes.update(dict.fromkeys(changed, shape))
        for node in {link.source for link in changed}:
            await self._inside(node, "tc", "qdisc", "del", "dev", DEVICE, "root", check=False)
            for command in shape_commands(
                    [(self._address(link.target), known) for link, known in self._shapes.items()
                     if link.source == node]):
                await self._inside(node, *command)

    async def _refused(self) -> int:
        return sum([refused_packets(await self._inside(node, "cat", "/proc/net/snmp"))
                    for node in self._numbers])

    async def effect(self) -> int:
        shaped = sum([shaped_packets(await self._inside(
            node, "tc", "-s", "-j", "qdisc", "show", "dev", DEVICE))
            for node in {link.source for link in self._shapes}])
        return await self._refused() - self._refused_before + shaped

    async def heal(self) -> None:
        shaped = {link.source for link in self._shapes}
        self._shapes.clear()
        for node in self._numbers:
            await self._inside(node, "ip", "route", "flush", "type", "blackhole", check=False)
            if node in shaped:
                await self._inside(node, "tc", "qdisc", "del", "dev", DEVICE, "root", check=False)
        self._refused_before = await self._refused()

    async def stop(self) -> None:
        if self._starting is not None and not self._starting.done():
            await asyncio.wait([self._starting])
        await self._take_down()
        self._numbers.clear()

    async def _take_down(self) -> None:
        while self._undo:
            # A veth pair before its namespace: with that the kernel takes it down at its leisure,
            # and the name is taken.
            await run_command(*self._undo[-1], check=False)
            self._undo.pop()


async def require_connection(network: NamespaceNetwork, source: str, target: str) -> None:
    """Raise `Unsupported` unless connections to `target` come about from `source` and from here:
    what forwards packets may drop them without a word."""
    host, _, port = network.raft_address(target).rpartition(":")
    listener = await asyncio.create_subprocess_exec(
        *network.launch_prefix(target), sys.executable, "-c", _LISTEN, host, port,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        if listener.stdout is None or not await listener.stdout.readline():
            raise Unsupported(f"nothing can listen in the namespace of {target}")
        for name, prefix in ((f"the namespace of {source}", network.launch_prefix(source)),
                             ("here", [])):
            try:
                await run_command(*prefix, sys.executable, "-c", _CONNECT, host, port,
                                  str(CONNECT_TIMEOUT_S))
            except Unsupported as error:
                reason = str(error).splitlines()[-1]
                raise Unsupported(f"no connection from {name} to the namespace of {target}: "
                                  f"{reason}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            listener.kill()
        await listener.wait()


async def namespaces_work() -> str:
    """"" when this machine supports namespaces with shaping, and connections between them, else
    what is missing."""
    network = NamespaceNetwork(seed=os.getpid())
    try:
        await network.start(["a", "b"])
        await network.shape([Link("a", "b")], LinkShape(latency_ms=1.0))
        await require_connection(network, "a", "b")
    except Unsupported as error:
        return str(error)
    finally:
        await to_the_end(network.stop())
    return ""
