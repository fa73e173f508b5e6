"""Reservations: the sum is never below the nonces that can have been made, whatever the order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import StoreCorrupt
from elastickv.keys.usage import (
    MAX_COUNT,
    Limits,
    Usage,
    apply_reservation,
    decode_usage,
    encode_usage,
    reservation_target,
    total_usage,
    usage_key,
    usage_prefix,
)
from elastickv.wire import Reservation

DEK, NODE = 7, 0xAAAA_0000_0000_1234


def reserve(existing: Usage | None, epoch: int, count: int) -> Usage:
    key, value = apply_reservation(encode_usage(existing) if existing else None,
                                   Reservation(DEK, NODE, epoch, count))
    assert key == usage_key(DEK, 0x1234)
    assert key.startswith(usage_prefix(DEK))
    return decode_usage(value)


@pytest.mark.parametrize(("existing", "epoch", "count", "expected"), [
    (None, 3, 100, Usage(0, 3, 100)),
    (Usage(0, 3, 100), 3, 250, Usage(0, 3, 250)),
    (Usage(0, 3, 100), 3, 50, Usage(0, 3, 100)),
    (Usage(0, 3, 100), 4, 10, Usage(100, 4, 10)),
    (Usage(100, 4, 10), 6, 5, Usage(110, 6, 5)),
    (Usage(100, 4, 10), 3, 7, Usage(107, 4, 10)),
    (Usage(MAX_COUNT, 4, 10), 5, 7, Usage(MAX_COUNT, 5, 7)),
    (Usage(MAX_COUNT, 4, 10), 3, 7, Usage(MAX_COUNT, 4, 10)),
], ids=["first", "higher count", "lower count", "next epoch", "epoch after a gap",
        "late entry of an ended epoch", "sum at its end", "late entry, sum at its end"])
def test_reservation(existing: Usage | None, epoch: int, count: int, expected: Usage) -> None:
    assert reserve(existing, epoch, count) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1000)), min_size=1, max_size=12))
def test_the_sum_covers_the_highest_count_of_every_epoch(
        reservations: list[tuple[int, int]]) -> None:
    usage: Usage | None = None
    highest: dict[int, int] = {}
    for epoch, count in reservations:
        before = usage.total if usage else 0
        usage = reserve(usage, epoch, count)
        assert usage.total >= before
        highest[epoch] = max(highest.get(epoch, 0), count)
    assert usage is not None
    assert usage.total >= sum(highest.values())


@given(st.integers(0, MAX_COUNT), st.integers(0, 0xFFFF), st.integers(0, MAX_COUNT))
def test_a_row_reads_back(ended: int, epoch: int, reserved: int) -> None:
    assert decode_usage(encode_usage(Usage(ended, epoch, reserved))) == (ended, epoch, reserved)


def test_a_row_of_another_size_is_corrupt() -> None:
    with pytest.raises(StoreCorrupt, match="17 bytes"):
        decode_usage(bytes(17))


def test_the_total_is_over_all_nodes() -> None:
    rows = [(usage_key(DEK, node), encode_usage(Usage(ended, 2, reserved)))
            for node, ended, reserved in ((1, 10, 5), (2, 0, 7))]
    assert total_usage(rows) == 22


LIMITS = Limits(1000)  # blocks of 3


@pytest.mark.parametrize(("total", "due", "left"), [
    (0, False, 1000), (899, False, 101), (900, True, 100), (1000, True, 0), (1100, True, 0),
])
def test_rotation_is_due_at_ninety_percent(total: int, due: bool, left: int) -> None:
    assert LIMITS.rotation_due(total) is due
    assert LIMITS.left(total) == left


@pytest.mark.parametrize(("max_writes", "block"), [
    (100, 1), (1000, 3), (1 << 24, 65_536), (1 << 32, 65_536),
])
def test_blocks_are_small_beside_the_limit(max_writes: int, block: int) -> None:
    assert Limits(max_writes).block == block


@pytest.mark.parametrize(("used", "reserved", "total", "wanted", "beyond_limit", "target"), [
    (0, 0, 0, 1, False, 3),
    (0, 0, 0, 50, False, 50),
    (3, 3, 3, 1, False, 6),
    (2, 6, 6, 1, False, 9),
    (0, 0, 998, 1, False, 2),
    (0, 0, 999, 1, False, 1),
    (0, 0, 1000, 1, False, None),
    (0, 0, 990, 11, False, None),
    (500, 500, 990, 10, False, 510),
    (0, 0, 1000, 1, True, 1),
    (0, 0, 65_536, 1, True, 1),
    (0, 0, 0, 5000, False, 5000),
    (0, 3, 3, 5000, False, 5000),
    (1, 3, 3, 5000, False, None),
    (0, 0, 3, 5000, False, None),
], ids=["a block", "more than a block", "the next block", "ahead of need", "the last block, cut",
        "the last nonce", "spent", "a group that does not fit any more", "exactly to the limit",
        "beyond the limit", "beyond a limit that was lowered",
        "a fresh DEK takes any group", "a fresh DEK with its first block",
        "not fresh: used", "not fresh: used elsewhere"])
def test_reservation_target(used: int, reserved: int, total: int, wanted: int, beyond_limit: bool,
                            target: int | None) -> None:
    assert reservation_target(LIMITS, used=used, reserved=reserved, total=total, wanted=wanted,
                              beyond_limit=beyond_limit) == target


@given(st.integers(100, 1 << 20), st.data())
def test_user_writes_never_pass_the_limit_of_a_dek_in_use(max_writes: int,
                                                           data: st.DataObject) -> None:
    reserved = data.draw(st.integers(1, max_writes))
    used = data.draw(st.integers(1, reserved))
    elsewhere = data.draw(st.integers(0, max_writes))
    wanted = data.draw(st.integers(1, 10_000))
    target = reservation_target(Limits(max_writes), used=used, reserved=reserved,
                                total=elsewhere + reserved, wanted=wanted, beyond_limit=False)
    if target is not None:
        assert used + wanted <= target
        assert elsewhere + target <= max_writes
