"""The MVCC key codec and the rules of visibility. Pure.

A store key is the user key in an order-preserving form, then the inverted commit timestamp, so that
byte order is (user key ascending, timestamp descending) and the newest version of a key comes
first:

    group 1 (24) | marker | group 2 (24) | marker | ... | 2^64-1 - commit_ts (8, big-endian)

The user key is cut into groups of 24 bytes, the last one padded with zeros. A marker is 25 when
more groups follow, else the number of the group's bytes that belong to the key (1-24). "ab" sorts
before "ab\\0" because their padded groups are equal and their markers are 2 and 3; "ab" before
"abc" because the padding is the lowest byte. Groups rather than escaped zeros: LMDB's longest key
is 511 bytes, which holds the longest user key (480 bytes = 20 groups = 508) whatever its bytes are,
while escaping would double a key of zeros.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from elastickv.clock import MAX_TIMESTAMP
from elastickv.errors import IntegrityError, InvalidArgument, StoreCorrupt
from elastickv.store.header import MAX_FLAGS, NEVER, TOMBSTONE_BIT

MAX_USER_KEY_BYTES = 480
GROUP_BYTES = 24
TIMESTAMP_BYTES = 8
MAX_STORE_KEY_BYTES = (MAX_USER_KEY_BYTES // GROUP_BYTES) * (GROUP_BYTES + 1) + TIMESTAMP_BYTES

_STRIDE = GROUP_BYTES + 1
_ONE_GROUP = _STRIDE + TIMESTAMP_BYTES
_MORE = GROUP_BYTES + 1
_MARKERS = [bytes((count,)) for count in range(_MORE + 1)]
_PADDING = [bytes(GROUP_BYTES - count) for count in range(GROUP_BYTES + 1)]
_pack_inverted = struct.Struct(">Q").pack


class Version(NamedTuple):
    """One version of a key: its commit timestamp, store key, and record (header + body)."""

    commit_ts: int
    store_key: bytes
    record: bytes


def key_prefix(user_key: bytes) -> bytes:
    """The order-preserving form of `user_key`: what all of its versions' store keys start with.

    No other key's store keys start with it. Raises `InvalidArgument` unless 1-480 bytes long.
    """
    size = len(user_key)
    if 0 < size <= GROUP_BYTES:
        return user_key.ljust(GROUP_BYTES, b"\0") + _MARKERS[size]
    if not 0 < size <= MAX_USER_KEY_BYTES:
        raise InvalidArgument(f"a key of {size} bytes is outside 1-{MAX_USER_KEY_BYTES} bytes")
    groups = []
    for start in range(0, size - GROUP_BYTES, GROUP_BYTES):
        groups.append(user_key[start:start + GROUP_BYTES])
        groups.append(_MARKERS[_MORE])
    rest = user_key[len(groups) // 2 * GROUP_BYTES:]
    groups.append(rest.ljust(GROUP_BYTES, b"\0"))
    groups.append(_MARKERS[len(rest)])
    return b"".join(groups)


def scan_bound(user_key: bytes) -> bytes:
    """Where the store keys of the keys at or after `user_key` begin; b"" (unbounded) stays b"".

    A bound may be longer than a key: it then lies just after the key that it starts with.
    """
    if not user_key:
        return b""
    if len(user_key) <= MAX_USER_KEY_BYTES:
        return key_prefix(user_key)
    return key_prefix(user_key[:MAX_USER_KEY_BYTES]) + b"\xff" * (TIMESTAMP_BYTES + 1)


def version_suffix(at_ts: int) -> bytes:
    """What the store key of a version at `at_ts` ends with; of earlier ones, something greater."""
    return _pack_inverted(MAX_TIMESTAMP - at_ts)


def encode_store_key(user_key: bytes, commit_ts: int) -> bytes:
    """The store key of one version. Raises `InvalidArgument` for a key outside 1-480 bytes."""
    return key_prefix(user_key) + _pack_inverted(MAX_TIMESTAMP - commit_ts)


def decode_store_key(store_key: bytes) -> tuple[bytes, int]:
    """`(user_key, commit_ts)`. Raises `StoreCorrupt` for what `encode_store_key` never makes."""
    return decode_user_key(store_key), commit_ts_of(store_key)


def commit_ts_of(store_key: bytes) -> int:
    """The commit timestamp in a store key."""
    return MAX_TIMESTAMP - int.from_bytes(store_key[-TIMESTAMP_BYTES:], "big")


def decode_user_key(store_key: bytes) -> bytes:
    """The user key in a store key. Raises `StoreCorrupt` when it is malformed."""
    if len(store_key) == _ONE_GROUP:
        count = store_key[GROUP_BYTES]
        if not 0 < count <= GROUP_BYTES or store_key[count:GROUP_BYTES] != _PADDING[count]:
            raise StoreCorrupt("a store key has an impossible marker or padding")
        return store_key[:count]
    body = len(store_key) - TIMESTAMP_BYTES
    if body % _STRIDE or not _ONE_GROUP < len(store_key) <= MAX_STORE_KEY_BYTES:
        raise StoreCorrupt(f"a store key of {len(store_key)} bytes has an impossible length")
    last = body - _STRIDE
    parts = []
    for start in range(0, last, _STRIDE):
        if store_key[start + GROUP_BYTES] != _MORE:
            raise StoreCorrupt("a store key ends before its last group")
        parts.append(store_key[start:start + GROUP_BYTES])
    count = store_key[last + GROUP_BYTES]
    if not 0 < count <= GROUP_BYTES or (
            store_key[last + count:last + GROUP_BYTES] != _PADDING[count]):
        raise StoreCorrupt("a store key has an impossible marker or padding")
    parts.append(store_key[last:last + count])
    return b"".join(parts)


def time_left_ms(record: bytes, now_ms: int) -> int:
    """How long a record that is visible at `now_ms` stays so; 0 = for ever."""
    expiry = record[1:9]
    return 0 if expiry == NEVER else int.from_bytes(expiry, "little") - now_ms


def visible(record: bytes, now_ms: int) -> bool:
    """Whether a record (or its header alone) is neither a tombstone nor expired at `now_ms`.

    A value expires at its expiry: at `now_ms == expiry_ms` it is gone. Raises `IntegrityError` for
    an illegal header byte.
    """
    flags = record[0]
    if flags > MAX_FLAGS:
        raise IntegrityError(f"a stored record has an illegal header byte {flags:#04x}")
    if flags & TOMBSTONE_BIT:
        return False
    expiry = record[1:9]
    return expiry == NEVER or int.from_bytes(expiry, "little") > now_ms
