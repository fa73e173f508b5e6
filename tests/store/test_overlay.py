"""The overlay's version chains and sorted keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastickv.store.overlay import Chain, Overlay, find, insert

small_keys = st.sampled_from([b"a", b"a\x00", b"b", b"ba", b"\xff"])


def chain_items(chain: Chain | None) -> list[tuple[int, bytes]]:
    items = []
    while chain is not None:
        items.append((chain[0], chain[1]))
        chain = chain[2]
    return items


@given(st.lists(st.tuples(st.integers(1, 9), st.binary(max_size=2))))
def test_chain_is_newest_first_whatever_the_order_of_inserts(
        inserts: list[tuple[int, bytes]]) -> None:
    chain: Chain | None = None
    for commit_ts, record in inserts:
        chain = insert(chain, commit_ts, record)
    assert chain_items(chain) == sorted(dict(inserts).items(), reverse=True)


@given(st.lists(st.integers(1, 9), unique=True), st.integers(0, 10))
def test_find_takes_the_newest_not_after(timestamps: list[int], at_ts: int) -> None:
    chain: Chain | None = None
    for commit_ts in timestamps:
        chain = insert(chain, commit_ts, b"")
    found = find(chain, at_ts)
    expected = max((ts for ts in timestamps if ts <= at_ts), default=None)
    assert (found[0] if found else None) == expected


@given(st.lists(st.tuples(small_keys, st.integers(1, 99))), st.data())
def test_keys_stay_sorted_while_new_ones_come(writes: list[tuple[bytes, int]],
                                              data: st.DataObject) -> None:
    overlay = Overlay()
    for user_key, commit_ts in writes:
        overlay.put(user_key, commit_ts, b"record")
        if data.draw(st.booleans()):
            assert overlay.sorted_keys() == sorted(overlay.chains)
    keys = sorted({user_key for user_key, _ in writes})
    start, end = data.draw(small_keys), data.draw(small_keys)
    inside = [key for key in keys if start <= key < end]
    assert list(overlay.keys_between(start, end)) == inside
    assert list(overlay.keys_between(start, end, reverse=True)) == inside[::-1]
    assert list(overlay.keys_between(b"", b"")) == keys


def test_versions_come_in_store_key_order() -> None:
    overlay = Overlay()
    for user_key, commit_ts in [(b"b", 2), (b"a", 1), (b"b", 3), (b"a", 4)]:
        overlay.put(user_key, commit_ts, b"r%d" % commit_ts)
    assert list(overlay.versions()) == [
        (b"a", 4, b"r4"), (b"a", 1, b"r1"), (b"b", 3, b"r3"), (b"b", 2, b"r2")]
    assert (overlay.max_ts, overlay.version_count) == (4, 4)
    assert overlay.byte_count > 4 * len(b"br2")
