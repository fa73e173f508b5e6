"""The configuration that a node's log begins with, on its disk.

The log itself holds every later change; this file says what was in force before its first entry. It
is written when the node first starts, when a joining node was told the configuration, before
compaction drops a change, and when a snapshot replaces the log.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from elastickv.durable import Disk
from elastickv.raft.checked_file import encode_checked, load_checked
from elastickv.raft.journal import Journal
from elastickv.raft.membership import (
    Configuration,
    MembershipLog,
    decode_members,
    encode_members,
)

FILE_NAME = "members"
KIND = b"EKMB"


class StoredConfiguration(msgspec.Struct, array_like=True, frozen=True):
    """A configuration as it is stored and as it is told to a joining node."""

    index: int
    members: bytes


def pack_configuration(configuration: Configuration) -> bytes:
    """`configuration` as msgpack."""
    return msgspec.msgpack.encode(StoredConfiguration(configuration.index,
                                                      encode_members(configuration.members)))


def unpack_configuration(body: bytes) -> Configuration:
    """The inverse. Raises `WireError` or `msgspec.MsgspecError`."""
    stored = msgspec.msgpack.decode(body, type=StoredConfiguration)
    return Configuration(stored.index, decode_members(stored.members))


class ConfigurationFile:
    """The base configuration."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path

    def load(self) -> Configuration | None:
        """The stored base, None before the first start. Raises `JournalCorrupt` or `WireError`."""
        stored = load_checked(self._disk, self._path, KIND, StoredConfiguration)
        return None if stored is None else Configuration(stored.index,
                                                         decode_members(stored.members))

    def save(self, configuration: Configuration) -> None:
        """Durably make `configuration` the base."""
        self._disk.replace(self._path, encode_checked(KIND, pack_configuration(configuration)))


def replay_membership(base: Configuration, journal: Journal) -> MembershipLog:
    """The base and every change that the log holds."""
    membership = MembershipLog(base)
    follow_log(membership, journal)
    return membership


def follow_log(membership: MembershipLog, journal: Journal) -> None:
    """The log is another one: above its base, `membership` holds what the log does, no more."""
    membership.back_to_base()
    for index in journal.marked_indexes():
        membership.appended(index, journal.entry(index)[0])
