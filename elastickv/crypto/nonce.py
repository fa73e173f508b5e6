"""Nonces that cannot repeat, and the node ids that go into them.

    node_id16(2, BE) | local_epoch(2, BE) | write_count(8, BE)

The registry keeps node_id16 unique per DEK and epochs strictly rising per process, the factory
counts within one process; together no (key id, nonce) pair occurs twice.
"""

from __future__ import annotations

import struct
import threading
from typing import Final, NoReturn, SupportsIndex

from elastickv.errors import InvalidArgument, OperatorError

MAX_EPOCH: Final = 0xFFFF
MAX_WRITE_COUNT: Final = 0xFFFF_FFFF_FFFF_FFFF
MAX_NODE_ID: Final = 0xFFFF_FFFF_FFFF_FFFF

_FNV_OFFSET_BASIS = 0xCBF2_9CE4_8422_2325
_FNV_PRIME = 0x0000_0100_0000_01B3

_FIXED = struct.Struct(">HH")
_COUNT = struct.Struct(">Q")


class NonceExhausted(OperatorError):
    """Every nonce of this epoch has been used; a restart takes the next epoch."""


def full_node_id(raft_id: str) -> int:
    """FNV-1a-64 of the node's `--raftId` in UTF-8; a hash of 0 becomes 1."""
    state = _FNV_OFFSET_BASIS
    for byte in raft_id.encode():
        state = ((state ^ byte) * _FNV_PRIME) & MAX_NODE_ID
    return state or 1


def node_id16(full_id: int) -> int:
    """The low 16 bits, which go into nonces and registry keys."""
    return full_id & 0xFFFF


class NonceFactory:
    """The nonces of one process under one DEK, from write_count 1 on. Safe across threads.

    A copy would repeat its original's nonces, so it refuses to be copied or pickled.
    """

    __slots__ = ("_count", "_fixed", "_lock")

    def __init__(self, node_id: int, local_epoch: int) -> None:
        """`node_id` is the 16-bit id. Raises `InvalidArgument` when either exceeds 16 bits."""
        if not 0 <= node_id <= 0xFFFF:
            raise InvalidArgument(f"node id {node_id} does not fit in 16 bits")
        if not 0 <= local_epoch <= MAX_EPOCH:
            raise InvalidArgument(f"local epoch {local_epoch} is not in 0..{MAX_EPOCH}")
        self._fixed = _FIXED.pack(node_id, local_epoch)
        self._count = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many nonces were issued."""
        return self._count

    @property
    def local_epoch(self) -> int:
        """The epoch in every nonce of this factory."""
        return int.from_bytes(self._fixed[2:])

    def next(self) -> bytes:
        """The next 12-byte nonce. Raises `NonceExhausted` instead of wrapping around."""
        with self._lock:
            count = self._count + 1
            if count > MAX_WRITE_COUNT:
                raise NonceExhausted(f"epoch {self.local_epoch} has no nonces left",
                                     remedy="restart the node, which takes the next epoch")
            self._count = count
        return self._fixed + _COUNT.pack(count)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a nonce factory cannot be copied or serialized")
