"""The journal record: layout, damage, and what lies behind damage."""

from __future__ import annotations

import re
import struct

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import InvalidArgument, WireError
from elastickv.raft import part_checksums, records
from elastickv.raft.part_checksums import PartChecksums
from elastickv.raft.records import Record

LIMIT = 1 << 16


def test_layout_is_the_documented_one():
    command = b"\x00payload"
    position = struct.pack(">QQQ", 7, 3, 5)
    length = struct.pack(">I", len(command))
    checksum = google_crc32c.value(length + position + command)
    assert records.encode(7, 3, command, 5) \
        == length + struct.pack(">I", checksum) + position + command


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1),
                          st.binary(min_size=1, max_size=200), st.integers(0, 2**64 - 1))))
def test_what_was_encoded_is_decoded(rows):
    blob = b"".join(records.encode(index, term, command, synced)
                    for index, term, command, synced in rows)
    assert records.decode_all(blob, LIMIT) == [
        Record(command, index, term, synced) for index, term, command, synced in rows]


@given(st.binary(min_size=1, max_size=50), st.data())
def test_a_flipped_bit_is_always_noticed(command, data):
    blob = bytearray(records.encode(9, 2, command, 8))
    bit = data.draw(st.integers(0, len(blob) * 8 - 1))
    blob[bit // 8] ^= 1 << bit % 8
    assert records.decode_at(bytes(blob), 0, LIMIT) is None
    with pytest.raises(WireError):
        records.decode_all(bytes(blob), LIMIT)


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_short_record_is_none(cut):
    blob = records.encode(9, 2, b"\x00123456", 8)
    assert records.decode_at(blob[:-cut], 0, LIMIT) is None


def test_zeros_are_no_record():
    assert records.decode_at(bytes(4096), 0, LIMIT) is None


@pytest.mark.parametrize(("size", "allowed"), [(0, False), (1, True), (100, True), (101, False)])
def test_size_limit(size, allowed):
    if allowed:
        records.check_size(bytes(size), 100)
    else:
        with pytest.raises(InvalidArgument, match="1 to 100 bytes"):
            records.check_size(bytes(size), 100)


def _run(*rows: tuple[int, int]) -> bytes:
    return b"".join(records.encode(index, 1, b"\x00" + b"x" * 30, synced)
                    for index, synced in rows)


DAMAGED = b"\xff" * 45

BEHIND = [
    ("nothing", b"", 0),
    ("zeros only", bytes(500), 0),
    ("garbage only", bytes(range(1, 256)) * 3, 0),
    ("a record of the same unsynced group", _run((11, 8)), 8),
    ("a record that saw the damaged one durable", _run((11, 10)), 10),
    ("the proof comes later", _run((11, 8), (12, 8), (13, 12)), 12),
    ("two damaged ones, then proof", DAMAGED + _run((12, 11)), 11),
    ("proof behind a hole of hundreds", bytes(60_000) + _run((900, 899)), 899),
    ("an index that cannot have come so early", bytes(60) + _run((900, 899)), 0),
    ("proof behind a second hole", _run((11, 8)) + DAMAGED + _run((13, 12)), 12),
]


@pytest.mark.parametrize(("behind", "synced"), [case[1:] for case in BEHIND],
                         ids=[case[0] for case in BEHIND])
def test_what_lies_behind_the_damaged_record_10(behind, synced):
    assert records.synced_behind(DAMAGED + behind, 10, LIMIT) == synced


@given(low=st.integers(0, 1 << 24), count=st.integers(0, 1 << 18), other=st.integers(0, 1 << 25))
def test_the_pattern_of_a_range(low, count, other):
    pattern = re.compile(records._between(low.to_bytes(8, "big"), (low + count).to_bytes(8, "big")),
                         re.DOTALL)
    for number in (low, low + count, low + count // 2, low - 1, low + count + 1, other):
        if number >= 0:
            assert bool(pattern.fullmatch(number.to_bytes(8, "big"))) \
                is (low <= number <= low + count)


@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1), st.data())
def test_a_checksum_is_continued_over_any_part(content, checksum, data):
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    assert PartChecksums(content).extend(checksum, start, end) \
        == google_crc32c.extend(checksum, content[start:end])


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 1024, 65_537, 3_000_001])
def test_what_zeros_make_of_a_difference(count):
    one, other = (google_crc32c.extend(checksum, bytes(count)) for checksum in (7, 0xDEADBEEF))
    assert part_checksums.behind_zeros(7 ^ 0xDEADBEEF, count) == one ^ other


def test_bytes_that_look_like_records_everywhere_keep_nobody_waiting(monkeypatch):
    """As a client can have left them in a segment that is written over: each position has the index
    that is looked for, and a length that takes most of the rest."""
    checked = 0

    def counting(checksum: int, data: bytes) -> int:
        nonlocal checked
        checked += len(data)
        return google_crc32c.extend(checksum, data)

    monkeypatch.setattr(records, "extend", counting)
    monkeypatch.setattr(part_checksums, "extend", counting)
    count = 10_000
    data = struct.pack(">IIQ", 8 * count, 0, 12) * count
    assert records.synced_behind(data, 10, LIMIT << 4, salt=5) == 0
    assert checked < 4096 * count
