"""Listening sockets: on every address of a host that the machine has, and accepted from by hand.

asyncio's servers tell nobody of a connection before its TLS handshake is over, but it holds a
descriptor from the start.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

BACKLOG: Final = 1024
PAUSE_S: Final = 1.0

_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NOT_HERE: Final = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL)
"""A machine without IPv6, or one where it is disabled, says one of these of its addresses."""


def bind_each(addresses: Iterable[tuple[Any, ...]]) -> list[socket.socket]:
    """A socket for every address of `getaddrinfo` that this machine has. Raises `OSError`, also
    where it has none of them."""
    sockets: list[socket.socket] = []
    problem = errno.EADDRNOTAVAIL
    try:
        for family, _, _, _, address in dict.fromkeys(addresses):
            try:
                sockets.append(_bind(family, address))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                problem = error.errno
    except OSError:
        for each in sockets:
            each.close()
        raise
    if not sockets:
        raise OSError(problem, os.strerror(problem))
    return sockets


def _bind(family: int, address: Any) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


class Listener:
    """Listens on every address of a host; `on_accepted(socket)` owns what it is given. No more than
    `at_once` are accepted in one pass of the loop."""

    def __init__(self, on_accepted: Callable[[socket.socket], None], *,
                 at_once: int = BACKLOG) -> None:
        self._on_accepted = on_accepted
        self._at_once = at_once
        self._sockets: list[socket.socket] = []

    async def open(self, host: str, port: int) -> int:
        """Listen ("": on every address of the machine); the port. Raises `OSError`."""
        addresses = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self._sockets = bind_each(addresses)
        try:
            for listening in self._sockets:
                listening.listen(BACKLOG)
        except OSError:
            self.close()
            raise
        for listening in self._sockets:
            self._resume(listening)
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        """Listen no more. Idempotent."""
        sockets, self._sockets = self._sockets, []
        for listening in sockets:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()

    def _resume(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(self._at_once):
            try:
                accepted, _address = listening.accept()
            except OSError as error:
                # There is none left; or what befell a connection before it was accepted (accept(2)
                # names a dozen errors): the next ones are accepted in the next pass.
                if error.errno in _EXHAUSTED:
                    # It stays readable: without a pause the loop would do nothing else.
                    loop = asyncio.get_running_loop()
                    loop.remove_reader(listening)
                    loop.call_later(PAUSE_S, self._resume, listening)
                return
            accepted.setblocking(False)
            self._on_accepted(accepted)
