"""Whom a node knew when it last ran: the members' ids and addresses, kept in a file.

A node that must not start cannot ask the cluster who is in it; it reads this instead:

    <data directory>/contacts.json
    {"members": [{"node_id": "n2", "address": "10.0.0.2:50051"}, ...]}

`address` is the client address, "" while it is unknown. Nothing here is trusted for anything but
knowing whom to ask, and a damaged file is as good as none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from elastickv.durable import Disk
from elastickv.errors import DiskFull
from elastickv.raft.engine import Member

FILE_NAME = "contacts.json"
INTERVAL_S = 1.0


class Contact(NamedTuple):
    """One member."""

    node_id: str
    address: str


class _Entry(msgspec.Struct):
    node_id: str
    address: str


class _File(msgspec.Struct):
    members: list[_Entry]


def load(disk: Disk, data_directory: Path) -> list[Contact]:
    """The members at the last run; empty when there was none or the file is damaged."""
    try:
        document = msgspec.json.decode(disk.read(data_directory / FILE_NAME), type=_File)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return []
    return [Contact(entry.node_id, entry.address) for entry in document.members]


def store(disk: Disk, data_directory: Path, contacts: Sequence[Contact]) -> None:
    """Durably replace the file."""
    document = {"members": [contact._asdict() for contact in contacts]}
    disk.replace(data_directory / FILE_NAME, json.dumps(document, indent=2).encode() + b"\n")


class ContactBook:
    """Keeps the file up to date while the node runs."""

    def __init__(self, disk: Disk, data_directory: Path,
                 members: Callable[[], Sequence[Member]]) -> None:
        self._disk = disk
        self._directory = data_directory
        self._members = members
        self._known = load(disk, data_directory)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look at the members every second. Once."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="contacts")

    def stop(self, *, removed: str = "") -> None:
        """Look for the last time. Before the engine stops, which forgets the addresses. `removed`
        is no member any more, whether or not the engine has the entry that says so."""
        if self._task is not None:
            self._task.cancel()
            self.note(removed=removed)

    async def _run(self) -> None:
        while True:
            self.note()
            await asyncio.sleep(INTERVAL_S)

    def note(self, *, removed: str = "") -> None:
        """Write the file if the members have changed. An address once known is kept while the
        member cannot be reached. A disk that refuses is somebody else's to report."""
        addresses = dict(self._known)
        contacts = [Contact(member.node_id,
                            member.client_address or addresses.get(member.node_id, ""))
                    for member in self._members() if member.node_id != removed]
        if contacts and contacts != self._known:
            with contextlib.suppress(OSError, DiskFull):
                store(self._disk, self._directory, contacts)
                self._known = contacts
