"""A tap on the journals of running nodes: keeps every record, also those that go away later.

Compaction deletes segments, a new leader truncates conflicting tails, faults wipe disks. The nonce
audit must see what all of those held, so the tap reads each segment every fraction of a second and
appends records that it has not seen to one spool file per node.

A segment is re-read from its start when the last record taken from it is no longer there: then its
tail was truncated. What is written and truncated between two polls escapes; polls are frequent, and
the sealed values of acknowledged writes are in the store besides.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from elastickv.raft import records
from elastickv.raft.segment import HEADER_SIZE, SegmentHeader
from jepsen.disk_audit import MAX_COMMAND_BYTES

POLL_S = 0.2


@dataclass(slots=True)
class _Position:
    """How far a segment was read: the start and the header bytes of the last record, and its
    end."""

    last_start: int = HEADER_SIZE
    last_header: bytes = b""
    end: int = HEADER_SIZE


@dataclass(slots=True)
class _Spool:
    path: Path
    positions: dict[str, _Position] = field(default_factory=dict)
    seen: set[tuple[int, int, int]] = field(default_factory=set)


def journal_segments(data_directory: Path) -> list[Path]:
    """The segments that are there. A directory that goes away meanwhile holds none: disks are taken
    away while the tap looks at them, after a last poll of its own."""
    try:
        return sorted((data_directory / "raft").rglob("*.log"))
    except FileNotFoundError:
        return []


class JournalTap:
    """Copies journal records of `{node id: data directory}` into `directory/<node id>.spool`."""

    def __init__(self, data_directories: Mapping[str, Path], directory: Path) -> None:
        self._sources = dict(data_directories)
        self._spools = {node: _Spool(directory / f"{node}.spool") for node in self._sources}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.error = ""
        """Why the tap ended early; "" while it has missed nothing that it could read."""
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def spools(self) -> list[Path]:
        """The spool files written so far."""
        return [spool.path for spool in self._spools.values() if spool.path.exists()]

    def start(self) -> None:
        """Poll in a thread until `stop`."""
        self._thread = threading.Thread(target=self._run, name="journal-tap", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Poll once more and end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for node in self._sources:
            self.poll(node)

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_S):
                for node in self._sources:
                    self.poll(node)
        except Exception as error:  # Whatever it is, the audit has to know.
            self.error = f"the journal tap ended early: {type(error).__name__}: {error}"

    def poll(self, node: str) -> int:
        """Take what is new in the journal of `node`; the number of records. Call it before a fault
        takes a disk away."""
        with self._lock:
            spool = self._spools[node]
            taken: list[bytes] = []
            for path in journal_segments(self._sources[node]):
                taken += self._read_segment(path, spool)
            if taken:
                with spool.path.open("ab") as file:
                    file.writelines(taken)
            return len(taken)

    def forget(self, node: str) -> None:
        """The disk of `node` is another one now: read its segments from their starts."""
        with self._lock:
            self._spools[node].positions.clear()

    def _read_segment(self, path: Path, spool: _Spool) -> list[bytes]:
        position = spool.positions.setdefault(path.name, _Position())
        try:
            with path.open("rb") as file:
                header = SegmentHeader.decode(file.read(HEADER_SIZE))
                if header is None:
                    return []
                file.seek(position.last_start)
                if file.read(len(position.last_header)) != position.last_header:
                    spool.positions[path.name] = position = _Position()
                file.seek(position.end)
                data = file.read()
        except FileNotFoundError:
            return []
        taken: list[bytes] = []
        offset = 0
        while (found := records.decode_at(data, offset, MAX_COMMAND_BYTES,
                                          header.salt)) is not None:
            record, following = found
            identity = (record.index, record.term, records.crc32c(record.command))
            if identity not in spool.seen:
                spool.seen.add(identity)
                taken.append(records.encode(record.index, record.term, record.command,
                                            record.synced))
            position.last_start = position.end + offset
            position.last_header = data[offset:offset + records.HEADER_BYTES]
            offset = following
        position.end += offset
        return taken
