"""Nonces never repeat, and node ids are the ones of the vectors' hash."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.crypto import nonce
from elastickv.crypto.nonce import NonceExhausted, NonceFactory, full_node_id, node_id16
from elastickv.errors import InvalidArgument


def test_the_layout_and_the_first_count() -> None:
    factory = NonceFactory(0x0102, 0x0304)
    assert factory.next().hex(" ") == "01 02 03 04 00 00 00 00 00 00 00 01"
    assert factory.next().hex(" ") == "01 02 03 04 00 00 00 00 00 00 00 02"
    assert (factory.count, factory.local_epoch) == (2, 0x0304)


@given(st.sets(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)), min_size=2, max_size=5))
def test_writers_that_differ_in_node_or_epoch_never_meet(writers: set[tuple[int, int]]) -> None:
    issued = [factory.next() for writer in writers for factory in (NonceFactory(*writer),)
              for _ in range(3)]
    assert len(set(issued)) == len(issued)


def test_threads_never_get_the_same_nonce() -> None:
    factory = NonceFactory(1, 1)
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda _: [factory.next() for _ in range(2000)], range(8)))
    issued = [item for batch in batches for item in batch]
    assert len(set(issued)) == len(issued) == factory.count


def test_the_last_count_is_used_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonce, "MAX_WRITE_COUNT", 2)
    factory = NonceFactory(1, 1)
    factory.next()
    factory.next()
    for _ in range(2):
        with pytest.raises(NonceExhausted, match="epoch 1"):
            factory.next()
    assert factory.count == 2


def test_the_count_field_holds_the_largest_count() -> None:
    assert nonce.MAX_WRITE_COUNT == 2 ** 64 - 1


@pytest.mark.parametrize(("node", "epoch"), [(-1, 0), (0x1_0000, 0), (0, -1), (0, 0x1_0000)])
def test_node_and_epoch_fit_in_16_bits(node: int, epoch: int) -> None:
    with pytest.raises(InvalidArgument):
        NonceFactory(node, epoch)


def test_a_factory_cannot_be_duplicated() -> None:
    factory = NonceFactory(1, 1)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(factory)


def test_the_hash_of_no_bytes_is_the_offset_basis() -> None:
    assert full_node_id("") == 0xCBF29CE484222325


def test_a_hash_of_zero_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonce, "_FNV_OFFSET_BASIS", 0)
    assert full_node_id("") == 1


@given(st.text(max_size=30))
def test_node_ids_are_64_and_16_bits(raft_id: str) -> None:
    full = full_node_id(raft_id)
    assert 1 <= full <= nonce.MAX_NODE_ID
    assert node_id16(full) == full % 2 ** 16
