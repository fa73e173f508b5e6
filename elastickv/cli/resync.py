"""`elastickv admin encryption resync-sidecar`: the part that works on the stopped node's files."""

from __future__ import annotations

import os
from pathlib import Path

from elastickv import data_directory as ownership
from elastickv import hygiene, resync
from elastickv.cli.connection import Connection
from elastickv.crypto.kek_file import FileKekProvider
from elastickv.durable import OsDisk
from elastickv.errors import ConfigError
from elastickv.keys.guards import DataDirectoryUnusable
from elastickv.keys.registry import WRITERS_PREFIX
from elastickv.raft.hardstate import FILE_NAME, owner_of
from elastickv.resync import Resynced
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc_store import Store


def resync_stopped_node(connection: Connection, raft_id: str, data_directory: Path,
                        kek_file: Path) -> Resynced:
    """Take the node's lock, ask the leader, write the sidecar.

    Raises `ConfigError` for a directory that is none or another node's, `DataDirectoryUnusable`
    for one of another user, `AlreadyRunning`, and what `resync.take_over` raises.
    """
    hygiene.disable_core_dumps()
    if not data_directory.is_dir():
        raise ConfigError(f"--raftDataDir: {data_directory} is not a directory",
                          remedy="run this on the stopped node's machine")
    _require_own(data_directory, raft_id)
    _require_user(data_directory)
    kek = FileKekProvider(kek_file).load()
    descriptor = ownership.take(data_directory)
    try:
        rows = _writer_rows(data_directory)
        return connection.run(lambda client: resync.take_over(
            client, raft_id, kek, OsDisk(), data_directory, rows))
    finally:
        os.close(descriptor)


def _require_own(data_directory: Path, raft_id: str) -> None:
    if not (data_directory / "raft" / FILE_NAME).exists():
        raise ConfigError(f"--raftDataDir: {data_directory} holds no node's data",
                          remedy="name the directory that the stopped node was started with")
    owner = owner_of(OsDisk(), data_directory / "raft")
    if owner not in ("", raft_id):
        raise ConfigError(f"--raftDataDir: {data_directory} is that of member {owner}, not of"
                          f" {raft_id}", remedy=f"give --raftId {owner}, or that node's directory")


def _require_user(data_directory: Path) -> None:
    """What another user wrote, the node could not read."""
    owner = ownership.other_owner(data_directory)
    if owner:
        raise DataDirectoryUnusable(
            f"the node on {data_directory} runs as user {owner}, and this is another user",
            remedy=ownership.as_user(owner, "..."))


def _writer_rows(data_directory: Path) -> list[tuple[bytes, bytes]]:
    directory = data_directory / "store"
    if not directory.exists():
        return []
    store = Store.open(LmdbBackend(directory))
    try:
        return store.rows(WRITERS_PREFIX)
    finally:
        store.close()
