"""The storage backends: LMDB for nodes, memory over a `durable.Disk` for tests and simulation."""

from __future__ import annotations

from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.tables import (
    Backend,
    BackendStats,
    ImportSink,
    MapFull,
    ReadView,
    Table,
    WriteBatch,
)

__all__ = ["Backend", "BackendStats", "ImportSink", "LmdbBackend", "MapFull", "MemoryBackend",
           "ReadView", "Table", "WriteBatch"]
