"""Ports of the loopback address for servers that are about to start.

None is given twice in one process, and all are below the range from which Linux takes the ports of
outgoing connections (ip(7), ip_local_port_range): a node that is down for a moment finds its own
port free again.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator, Mapping

HOST = "127.0.0.1"
_CANDIDATES = range(10_000, 32_000)


def own_candidates(environment: Mapping[str, str]) -> range:
    """The ports of this process. The workers of one pytest run have different ones: a port is given
    a while before somebody listens there."""
    count = int(environment.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(environment.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return _CANDIDATES[number % count::count]


def _unused() -> Iterator[int]:
    candidates = own_candidates(os.environ)
    # Not the seeded generator: processes that run at the same time must not agree.
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) != 0:
                yield port


_ports = _unused()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now. Raises `RuntimeError` when all have been given."""
    ports = list(itertools.islice(_ports, count))
    if len(ports) < count:
        raise RuntimeError("no free ports are left")
    return ports


def free_address() -> str:
    """`host:port` with one of them."""
    return f"{HOST}:{free_ports(1)[0]}"
