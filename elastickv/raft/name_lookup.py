"""The addresses behind peers' names, looked up beside the event loop.

A lookup cannot be cancelled and may take ten seconds or more when a name server does not answer.
The loop's own lookups share few threads (two, in libuv), and the loop waits for all of them at its
end: one dead name would keep all other members from being dialled, and the process from exiting. So
each name has a thread of its own, at most one at a time, and nobody waits for it at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Protocol

from elastickv.config import is_ip_address


class NameLookup(Protocol):
    """What a dialler asks before it dials."""

    async def addresses(self, host: str) -> Sequence[str]:
        """The addresses of `host`, best first. Raises `OSError`."""
        ...


class ThreadedNameLookup:
    """`NameLookup` by `getaddrinfo` in daemon threads. For one event loop."""

    def __init__(self) -> None:
        self._lookups: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def addresses(self, host: str) -> Sequence[str]:
        """As `NameLookup.addresses`. A caller may give up; the next one takes what was found."""
        if is_ip_address(host):
            return [host]
        lookup = self._lookups.get(host)
        if lookup is None:
            lookup = self._lookups[host] = self._begin(host)
        try:
            return await asyncio.shield(lookup)
        finally:
            if lookup.done():
                self._lookups.pop(host, None)

    @staticmethod
    def _begin(host: str) -> asyncio.Future[Sequence[str]]:
        loop = asyncio.get_running_loop()
        lookup: asyncio.Future[Sequence[str]] = loop.create_future()
        # Whoever asked may have given up: then an error is nobody's.
        lookup.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

        def run() -> None:
            try:
                found: Sequence[str] | OSError = look_up(host)
            except OSError as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_settle, lookup, found)

        threading.Thread(target=run, name=f"look up {host}", daemon=True).start()
        return lookup


def _settle(lookup: asyncio.Future[Sequence[str]], found: Sequence[str] | OSError) -> None:
    if isinstance(found, OSError):
        lookup.set_exception(found)
    else:
        lookup.set_result(found)


def look_up(host: str) -> Sequence[str]:
    """The addresses of `host` as the system has them; blocks. Raises `OSError`."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(f"{host!r} is no host name") from None
    return [str(address[0]) for *_, address in found]
