"""The registry cases as a table, and the row codec."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import EntryRejected, EpochRollback, NodeIdCollision, StoreCorrupt
from elastickv.keys.registry import (
    WRITERS_PREFIX,
    WriterRecord,
    decide,
    decode_row_key,
    decode_row_value,
    encode_row_value,
    row_key,
)
from elastickv.wire import RegistryRow

NODE = 0xAAAA_0000_0000_0011
TWIN = 0xBBBB_0000_0000_0011  # the same low 16 bits
SEEN = encode_row_value(WriterRecord(NODE, 2, 5))


def row(epoch: int, node: int = NODE, dek_id: int = 7) -> RegistryRow:
    return RegistryRow(dek_id, node, epoch)


@pytest.mark.parametrize(("existing", "incoming", "written"), [
    pytest.param(None, row(5), WriterRecord(NODE, 5, 5), id="1 absent"),
    pytest.param(None, row(0), WriterRecord(NODE, 0, 0), id="1 absent, epoch 0"),
    pytest.param(SEEN, row(6), WriterRecord(NODE, 2, 6), id="2 next epoch"),
    pytest.param(SEEN, row(0xFFFF), WriterRecord(NODE, 2, 0xFFFF), id="2 last epoch"),
    pytest.param(SEEN, row(5), None, id="2i same epoch"),
])
def test_accepted_cases(existing: bytes | None, incoming: RegistryRow,
                        written: WriterRecord | None) -> None:
    assert decide(existing, incoming) == written


@pytest.mark.parametrize(("existing", "incoming", "error"), [
    pytest.param(SEEN, row(4), EpochRollback, id="3 lower epoch"),
    pytest.param(SEEN, row(2), EpochRollback, id="3 first seen epoch"),
    pytest.param(SEEN, row(0), EpochRollback, id="3 epoch 0"),
    pytest.param(SEEN, row(5, TWIN), NodeIdCollision, id="4 other node, same epoch"),
    pytest.param(SEEN, row(9, TWIN), NodeIdCollision, id="4 other node, higher epoch"),
    pytest.param(SEEN, row(0, TWIN), NodeIdCollision, id="4 other node, lower epoch"),
    pytest.param(None, row(1, dek_id=0), EntryRejected, id="DEK id 0"),
    pytest.param(SEEN[:-1], row(9), StoreCorrupt, id="short row"),
    pytest.param(SEEN + b"\x00", row(9), StoreCorrupt, id="long row"),
    pytest.param(b"", row(9), StoreCorrupt, id="empty row is not absent"),
])
def test_refused_cases(existing: bytes | None, incoming: RegistryRow,
                       error: type[Exception]) -> None:
    with pytest.raises(error):
        decide(existing, incoming)


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=20))
def test_last_seen_never_goes_down_and_first_seen_never_moves(epochs: list[int]) -> None:
    value: bytes | None = None
    for epoch in epochs:
        before = decode_row_value(value) if value is not None else None
        try:
            record = decide(value, row(epoch))
        except EpochRollback:
            continue
        if record is None:
            assert before is not None and before.last_seen_epoch == epoch
            continue
        value = encode_row_value(record)
        after = decode_row_value(value)
        assert after.first_seen_epoch == epochs[0]
        assert before is None or after.last_seen_epoch >= before.last_seen_epoch
    assert value is not None
    assert decode_row_value(value).last_seen_epoch == max(epochs)


@given(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF))
def test_a_row_key_decodes_to_itself(dek_id: int, node_id: int) -> None:
    key = row_key(dek_id, node_id)
    assert len(key) == len(WRITERS_PREFIX) + 7
    assert decode_row_key(key) == (dek_id, node_id)


@given(st.integers(0, 2 ** 64 - 1), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_a_row_value_decodes_to_itself(node: int, first: int, last: int) -> None:
    record = WriterRecord(node, first, last)
    assert decode_row_value(encode_row_value(record)) == record


@pytest.mark.parametrize("key", [
    b"", WRITERS_PREFIX, row_key(1, 1)[:-1], row_key(1, 1) + b"\x00", b"x" * 27,
    row_key(1, 1).replace(b"\x00\x00\x00\x01|", b"\x00\x00\x00\x01:")])
def test_another_key_is_refused(key: bytes) -> None:
    with pytest.raises(StoreCorrupt):
        decode_row_key(key)
