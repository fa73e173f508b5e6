"""MVCC store: opaque records in LMDB behind an in-memory overlay, with snapshots and compaction."""
