"""The key-value operations of one node, put together: writes and reads."""

from __future__ import annotations

from collections.abc import Callable

from elastickv.clock import HybridLogicalClock
from elastickv.errors import ElasticKVError
from elastickv.kv.coordinator import Coordinator
from elastickv.kv.encryption import EncryptionController
from elastickv.kv.reads import Reader
from elastickv.raft.engine import RaftEngine
from elastickv.store.flusher import Runner
from elastickv.store.mvcc_store import Store


class KeyValue:
    """Implements `kv.api.KvApi`. `opener`, `prefetcher` and `writable` are those of `Reader` and
    `Coordinator`."""

    def __init__(self, engine: RaftEngine, store: Store, hlc: HybridLogicalClock,
                 encryption: EncryptionController, *, opener: Callable[[bytes, bytes], bytes],
                 writable: Callable[[], ElasticKVError | None], max_value_bytes: int,
                 max_request_bytes: int, prefetcher: Runner | None = None) -> None:
        self.writes = Coordinator(
            engine, hlc, encryption.proposer, sealer=encryption.record_sealer, writable=writable,
            max_value_bytes=max_value_bytes, max_request_bytes=max_request_bytes)
        self.reads = Reader(engine, store, hlc, opener=opener, prefetcher=prefetcher)
        # Their methods themselves: a call takes no step more.
        self.put, self.delete, self.batch = self.writes.put, self.writes.delete, self.writes.batch
        self.get, self.scan = self.reads.get, self.reads.scan
        self.latest_commit_ts = self.reads.latest_commit_ts
