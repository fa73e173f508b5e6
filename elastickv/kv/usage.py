"""Nonce budgets: this process may count only as far as a committed reservation reaches.

`keys.usage` has the rules. Here they are kept for one process: a budget runs low, a reservation
goes into the log ahead of need, and what waits for it is woken when it is applied. Only a leader
seals, hence only a leader reserves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

from elastickv.crypto.nonce import NonceFactory, node_id16
from elastickv.keys.usage import (
    USAGE_PREFIX,
    Limits,
    Usage,
    decode_usage,
    reservation_target,
    total_usage,
    totals_by_dek,
    usage_key,
    usage_prefix,
)
from elastickv.kv.writers import WriterRegistrar
from elastickv.wire import Reservation, encode_entry

RETRY_S = 0.05


class UsageRows(Protocol):
    """The part of the store that holds reservations."""

    def row(self, key: bytes) -> bytes | None: ...

    def rows(self, prefix: bytes = b"") -> list[tuple[bytes, bytes]]: ...


class NonceBudgets:
    """The budgets of one process.

    `propose(payload)` appends an entry to the log at once, unsealed, and returns its future;
    `on_change()` is called when a budget has grown or has turned out to be spent for good.
    """

    def __init__(self, rows: UsageRows, writers: WriterRegistrar, full_node_id: int,
                 limits: Limits, *, propose: Callable[[bytes], asyncio.Future[object]],
                 on_change: Callable[[], None]) -> None:
        self._rows = rows
        self._writers = writers
        self._full_node_id = full_node_id
        self._propose = propose
        self._on_change = on_change
        self._pending: dict[int, asyncio.Future[object]] = {}
        self._spent: set[int] = set()
        self._beyond_limit: set[int] = set()
        """DEKs of which all that is reserved and not used is for entries of the cluster's own."""
        self.limits = limits

    def take(self, dek_id: int, wanted: int, *, beyond_limit: bool = False) -> NonceFactory | None:
        """The factory, if `wanted` more nonces are reserved; None, and work on it, if not.

        `beyond_limit`: they may go beyond the limit of user writes, as for an entry of the
        cluster's own. The caller takes its nonces before it yields to the loop.
        """
        factory = self._writers.nonces(dek_id)
        if factory is None:
            return None
        usage = self._own(dek_id, factory.local_epoch)
        left = usage.reserved - factory.count
        if not beyond_limit and dek_id in self._beyond_limit:
            left = 0
        if left < wanted or left < self.limits.block // 2:
            self._refill(dek_id, factory, usage, wanted, beyond_limit=beyond_limit,
                         urgent=left < wanted)
        return factory if left >= wanted else None

    def reserve_first(self, dek_id: int, epoch: int) -> None:
        """Reserve for a DEK that a rotation just put into the log, so that both commit together."""
        if dek_id not in self._pending:
            self._reserve(dek_id, epoch, self.limits.block)

    @property
    def any_spent(self) -> bool:
        """Whether `is_spent` holds for any DEK."""
        return bool(self._spent)

    def is_spent(self, dek_id: int) -> bool:
        """Whether the limit keeps user writes from taking another nonce."""
        return dek_id in self._spent

    def total(self, dek_id: int) -> int:
        """An upper bound of the nonces ever made under a DEK, by all nodes."""
        return total_usage(self._rows.rows(usage_prefix(dek_id)))

    def totals(self) -> dict[int, int]:
        """`total` of each DEK that has a reservation, in one pass over the rows."""
        return totals_by_dek(self._rows.rows(USAGE_PREFIX))

    def _own(self, dek_id: int, epoch: int) -> Usage:
        value = self._rows.row(usage_key(dek_id, node_id16(self._full_node_id)))
        usage = decode_usage(value) if value is not None else None
        if usage is None or usage.local_epoch != epoch:
            return Usage(0, epoch, 0)
        return usage

    def _refill(self, dek_id: int, factory: NonceFactory, usage: Usage, wanted: int, *,
                beyond_limit: bool, urgent: bool) -> None:
        if dek_id in self._pending:
            return
        total = self.total(dek_id)
        target = reservation_target(
            self.limits, used=factory.count, reserved=usage.reserved, total=total, wanted=wanted,
            beyond_limit=beyond_limit)
        if target is not None and target > usage.reserved:
            if beyond_limit and total - usage.reserved + target > self.limits.max_writes:
                self._beyond_limit.add(dek_id)
            else:
                self._spent.discard(dek_id)
            self._reserve(dek_id, factory.local_epoch, target)
        elif urgent and not beyond_limit and dek_id not in self._spent:
            self._spent.add(dek_id)
            asyncio.get_running_loop().call_soon(self._on_change)

    def _reserve(self, dek_id: int, epoch: int, count: int) -> None:
        future = self._propose(encode_entry(
            Reservation(dek_id, self._full_node_id, epoch, count)))
        self._pending[dek_id] = future
        future.add_done_callback(partial(self._reserved, dek_id))

    def _reserved(self, dek_id: int, future: asyncio.Future[object]) -> None:
        self._pending.pop(dek_id, None)
        if future.cancelled():
            return
        if future.exception() is not None:  # not leading any more, or of unknown outcome
            asyncio.get_running_loop().call_later(RETRY_S, self._on_change)
        else:
            self._on_change()
