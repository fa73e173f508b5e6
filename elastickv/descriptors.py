"""How many descriptors this process may have open, and how many of them its clients may hold.

A node that has none left can neither write its log nor talk to its members, so the client port
never gets the last ones.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Final

RESERVED: Final = 256
"""For the log, the store, the members, monitoring (`server.http.MAX_CONNECTIONS`), and whatever
comes and goes."""
MAX_CONNECTIONS: Final = 10_000
"""Where the process may have more, memory is the limit: a connection takes some 50 KiB."""


def raise_limit() -> int:
    """Allow as many as the hard limit does, where the kernel lets us; how many that are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Refused where the hard limit is above the kernel's own.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return limit()


def limit() -> int:
    """How many there may be; `resource.RLIM_INFINITY` for any number."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def for_clients(limit: int) -> int:
    """How many of `limit` descriptors may be client connections: all but the reserve, and half
    where there are few."""
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(limit - RESERVED, limit // 2))
