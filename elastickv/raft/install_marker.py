"""The durable announcement that a snapshot is being installed (`snapshot_receiver.py`)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from elastickv.durable import Disk
from elastickv.raft.checked_file import encode_checked, load_checked
from elastickv.raft.membership import Configuration, decode_members

MARKER_FILE_NAME = "install"
MARKER_KIND = b"EKIM"


class InstallMarker(msgspec.Struct, array_like=True, frozen=True):
    """Where the log begins once the import is finished."""

    index: int
    term: int
    members_index: int
    members: bytes

    def configuration(self) -> Configuration:
        """The configuration at the snapshot. Raises `WireError`."""
        return Configuration(self.members_index, decode_members(self.members))


class MarkerFile:
    """The marker on the disk."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path

    def load(self) -> InstallMarker | None:
        """The marker, None when no installation was under way. Raises `JournalCorrupt`."""
        return load_checked(self._disk, self._path, MARKER_KIND, InstallMarker)

    def save(self, marker: InstallMarker) -> None:
        """Durably announce an installation."""
        self._disk.replace(self._path, encode_checked(MARKER_KIND,
                                                      msgspec.msgpack.encode(marker)))

    def remove(self) -> None:
        """The installation is complete, or did not happen."""
        self._disk.remove(self._path)
