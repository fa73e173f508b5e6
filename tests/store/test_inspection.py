"""What is read of a store without opening it, against what opening it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.errors import StoreCorrupt
from elastickv.store.inspection import inspect
from elastickv.store.lmdb_backend import LmdbBackend, encode_current
from elastickv.store.mvcc_store import Store


def rename_generation(store: Path, name: str) -> None:
    (store / "gen-00000001.mdb").rename(store / name)
    (store / "gen-00000001.mdb-lock").unlink()


def only_a_later_generation(store: Path) -> None:
    rename_generation(store, "gen-00000002.mdb")
    (store / "CURRENT").unlink()


SOUND: dict[str, Callable[[Path], object]] = {
    "as it was": lambda store: None,
    "a later generation": lambda store: (
        rename_generation(store, "gen-00000002.mdb"),
        (store / "CURRENT").write_bytes(encode_current(2))),
}
DAMAGED: dict[str, Callable[[Path], object]] = {
    "no CURRENT": lambda store: (store / "CURRENT").unlink(),
    "no CURRENT, only a later generation": only_a_later_generation,
    "CURRENT names what is missing": lambda store: (
        store / "CURRENT").write_bytes(encode_current(2)),
    "CURRENT is damaged": lambda store: (store / "CURRENT").write_bytes(b"gen-00000001\n"),
    "the file is empty": lambda store: (store / "gen-00000001.mdb").write_bytes(b""),
}


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A store with a fact and a row in it."""
    store = Store.open(LmdbBackend(tmp_path / "store"))
    store.apply_group(1, [], rows=[(b"a row", b"1")], meta={b"fact": b"2"})
    store.flush_now()
    store.close()
    return tmp_path / "store"


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_a_sound_store_is_read_and_not_changed(used: Path,
                                               change: Callable[[Path], object]) -> None:
    change(used)
    before = {path: path.read_bytes() for path in used.iterdir()}
    facts = inspect(used, in_use=False)
    assert (facts.rows(), facts.meta(b"fact")) == ([(b"a row", b"1")], b"2")
    assert {path: path.read_bytes() for path in used.iterdir()} == before


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_what_refuses_to_open_is_refused(used: Path, change: Callable[[Path], object]) -> None:
    change(used)
    with pytest.raises(StoreCorrupt):
        inspect(used, in_use=False)
    with pytest.raises(StoreCorrupt):
        LmdbBackend(used)


@pytest.mark.parametrize("left", ["nothing", "the directory", "an unused first generation"])
def test_a_store_that_was_never_used_has_no_facts(tmp_path: Path, left: str) -> None:
    store = tmp_path / "store"
    if left == "the directory":
        store.mkdir()
    elif left == "an unused first generation":
        LmdbBackend(store).close()
        (store / "CURRENT").unlink()
    facts = inspect(store, in_use=False)
    assert (facts.rows(), facts.meta(b"fact")) == ([], None)
    LmdbBackend(store).close()
