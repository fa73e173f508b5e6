"""Pure rules of a write request: limits, and what its operations become in the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastickv.clock import timestamp_ms
from elastickv.errors import InvalidArgument
from elastickv.kv.api import MAX_KEY_BYTES, MAX_TTL_MS, Condition, Op, OpKind
from elastickv.store.values import tombstone_record
from elastickv.wire import WriteOp, WriteRequest

MAX_BATCH_OPS = 10_000

REQUEST_LOG_BYTES = 18
"""A request's timestamp and counts, and its length in an entry of several (see `wire`)."""
OP_LOG_BYTES = 50
"""What the log adds to an operation's key and value, at most: framing (7), value header (9) and
envelope (34)."""
CONDITION_LOG_BYTES = 10
"""What the log adds to a condition's key: its length, and the timestamp that is expected."""
PART_MEMORY_BYTES = 128
"""What an operation or a condition takes in memory, about, beside what it takes in the log."""

Sealer = Callable[[bytes, int, bytes, int], bytes]
"""`(user_key, commit_ts, plaintext, expiry_ms) -> record`: plain or under the storage DEK."""


def check_key(key: bytes, field: str = "key") -> None:
    """Raise `InvalidArgument` unless `key` has 1 to 480 bytes."""
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise InvalidArgument(f"{field} has {len(key)} bytes; the limit is 1 to {MAX_KEY_BYTES}",
                              remedy="use a shorter, non-empty key")


def check_batch_count(count: int) -> None:
    """Raise `InvalidArgument` for more operations and conditions than one request may have."""
    if count > MAX_BATCH_OPS:
        raise InvalidArgument(f"a batch has {count} operations and conditions; "
                              f"the limit is {MAX_BATCH_OPS}", remedy="split the batch")


def check_ops(ops: Sequence[Op], conditions: Sequence[Condition], *, max_value_bytes: int,
              max_request_bytes: int) -> int:
    """Raise `InvalidArgument` for a request over a limit; returns its size in bytes otherwise."""
    if not ops:
        raise InvalidArgument("a batch needs at least one operation", remedy="add an operation")
    check_batch_count(len(ops) + len(conditions))
    total = 0
    for op in ops:
        key_bytes = len(op.key)
        if not 0 < key_bytes <= MAX_KEY_BYTES:
            check_key(op.key)
        value_bytes = len(op.value)
        if value_bytes > max_value_bytes:
            raise InvalidArgument(
                f"value has {value_bytes} bytes; the limit is {max_value_bytes}",
                remedy="split the value or raise --max-value-bytes on every node")
        if not 0 <= op.ttl_ms <= MAX_TTL_MS:
            raise InvalidArgument(f"ttl_ms is {op.ttl_ms}; the limit is 0 to {MAX_TTL_MS}",
                                  remedy="use 0 for a value that never expires")
        total += key_bytes + value_bytes
    for condition in conditions:
        check_key(condition.key, "condition key")
    if total > max_request_bytes:
        raise InvalidArgument(
            f"a batch has {total} bytes of keys and values; the limit is {max_request_bytes}",
            remedy="split the batch")
    return total


def log_bytes(ops: Sequence[Op], conditions: Sequence[Condition], total: int) -> int:
    """What a request takes in the log, at most; `total` is what `check_ops` returned for it."""
    size = REQUEST_LOG_BYTES + OP_LOG_BYTES * len(ops) + total
    if conditions:
        size += sum(CONDITION_LOG_BYTES + len(condition.key) for condition in conditions)
    return size


def expiry_ms(commit_ts: int, ttl_ms: int) -> int:
    """Absolute expiry in milliseconds since the epoch; 0 = never."""
    return timestamp_ms(commit_ts) + ttl_ms if ttl_ms else 0


def build_request(ops: Sequence[Op], conditions: Sequence[Condition], commit_ts: int,
                  seal: Sealer) -> WriteRequest:
    """The log form of a request at `commit_ts`.

    Of several operations on one key the last wins: one timestamp names one version.
    """
    if len(ops) == 1:
        final: Sequence[Op] = ops
    else:
        final = list({op.key: op for op in ops}.values())
    return WriteRequest(
        commit_ts,
        [WriteOp(op.kind, op.key,
                 tombstone_record() if op.kind == OpKind.DELETE
                 else seal(op.key, commit_ts, op.value, expiry_ms(commit_ts, op.ttl_ms)))
         for op in final],
        [(condition.key, condition.commit_ts) for condition in conditions])
