"""The sidecar file: its exact bytes, what is refused, and a crash at every step of its write."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastickv.crypto.keystore import Purpose
from elastickv.durable import OsDisk
from elastickv.errors import CorruptionError, SidecarCorrupt
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.sidecar import Sidecar, SidecarKey, load, parse, store

CREATED = "2026-01-02T03:04:05Z"
WRAPPED = bytes(range(60))


def key(purpose: Purpose, epoch: int = 0) -> SidecarKey:
    return SidecarKey(purpose, WRAPPED, CREATED, epoch)


GOOD = Sidecar(
    raft_applied_index=900, storage_envelope_active=True, storage_envelope_cutover_index=700,
    raft_envelope_cutover_index=900, active_storage=10, active_raft=9,
    keys=MappingProxyType({9: key(Purpose.RAFT, 3), 10: key(Purpose.STORAGE, 0xFFFF),
                           200: key(Purpose.STORAGE)}))


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(GOOD.encode())
    return loaded


def encode(value: object) -> bytes:
    return json.dumps(value).encode()


def test_the_bytes_of_a_small_sidecar() -> None:
    small = Sidecar(raft_applied_index=5, active_storage=10, active_raft=9, keys=MappingProxyType(
        {10: key(Purpose.STORAGE), 9: key(Purpose.RAFT, 2)}))
    wrapped = base64.b64encode(WRAPPED).decode()
    assert small.encode().decode() == f"""{{
  "version": 2,
  "raft_applied_index": 5,
  "storage_envelope_active": false,
  "storage_envelope_cutover_index": 0,
  "raft_envelope_cutover_index": 0,
  "active": {{
    "storage": 10,
    "raft": 9
  }},
  "keys": {{
    "10": {{
      "purpose": "storage",
      "wrapped": "{wrapped}",
      "created": "{CREATED}",
      "local_epoch": 0
    }},
    "9": {{
      "purpose": "raft",
      "wrapped": "{wrapped}",
      "created": "{CREATED}",
      "local_epoch": 2
    }}
  }}
}}"""


KEYS = st.builds(SidecarKey, st.sampled_from(Purpose), st.binary(min_size=60, max_size=60),
                 st.just(CREATED), st.integers(0, 0xFFFF))
INDEXES = st.integers(0, 2 ** 64 - 1)


@st.composite
def sidecars(draw: st.DrawFn) -> Sidecar:
    storage, raft = draw(st.lists(st.integers(1, 2 ** 32 - 1), min_size=2, max_size=2, unique=True))
    keys = draw(st.dictionaries(st.integers(1, 2 ** 32 - 1), KEYS, max_size=3))
    keys[storage], keys[raft] = key(Purpose.STORAGE, 1), key(Purpose.RAFT, 2)
    active = draw(st.booleans())
    return Sidecar(draw(INDEXES), active, draw(INDEXES) if active else 0, draw(INDEXES),
                   storage, raft, MappingProxyType(keys))


@given(sidecars())
def test_a_sidecar_parses_to_itself(sidecar: Sidecar) -> None:
    assert parse(sidecar.encode()) == sidecar


def test_an_empty_sidecar_parses_to_itself() -> None:
    assert parse(Sidecar().encode()) == Sidecar()


def test_version_1_is_read_with_and_without_the_storage_cutover_index() -> None:
    old = {**document(), "version": 1}
    assert parse(encode(old)) == GOOD
    del old["storage_envelope_cutover_index"]
    parsed = parse(encode(old))
    assert parsed.storage_envelope_active
    assert parsed.storage_envelope_cutover_index == 0
    assert json.loads(parsed.encode())["version"] == 2


def change(**fields: object) -> Callable[[], bytes]:
    return lambda: encode({**document(), **fields})


def change_key(dek_id: str = "9", **fields: object) -> Callable[[], bytes]:
    def build() -> bytes:
        changed = document()
        changed["keys"][dek_id] = {**changed["keys"][dek_id], **fields}
        return encode(changed)
    return build


def without(name: str) -> Callable[[], bytes]:
    return lambda: encode({field: value for field, value in document().items() if field != name})


def with_key_named(name: str) -> Callable[[], bytes]:
    def build() -> bytes:
        changed = document()
        changed["keys"][name] = changed["keys"]["200"]
        return encode(changed)
    return build


DAMAGED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not json": lambda: b"{",
    "not utf-8": lambda: b"\xff" + GOOD.encode(),
    "not an object": lambda: b"[]",
    "deeply nested": lambda: b"[" * 100_000,
    "a number too long to read": lambda: GOOD.encode().replace(b"900", b"9" * 5000),
    "trailing bytes": lambda: GOOD.encode() + b"{}",
    "version 0": change(version=0),
    "version 3": change(version=3),
    "version true": change(version=True),
    "version text": change(version="2"),
    "unknown field": change(checksum="00"),
    **{f"without {name}": without(name) for name in document()},
    "repeated field": lambda: b'{"version": 2,' + GOOD.encode()[1:],
    "index negative": change(raft_applied_index=-1),
    "index over 64 bits": change(raft_envelope_cutover_index=2 ** 64),
    "index a float": change(raft_applied_index=1.0),
    "index a bool": change(storage_envelope_cutover_index=True),
    "index null": change(raft_applied_index=None),
    "flag a number": change(storage_envelope_active=1),
    "active not an object": change(active=[10, 9]),
    "active with another field": change(active={"storage": 10, "raft": 9, "log": 9}),
    "active storage missing": change(active={"storage": 11, "raft": 9}),
    "active storage is a raft key": change(active={"storage": 9, "raft": 9}),
    "active raft is a storage key": change(active={"storage": 10, "raft": 200}),
    "only storage active": change(active={"storage": 10, "raft": 0}),
    "only raft active": change(active={"storage": 0, "raft": 9}),
    "storage envelope without key": change(active={"storage": 0, "raft": 0},
                                           raft_envelope_cutover_index=0),
    "raft envelope without key": change(active={"storage": 0, "raft": 0},
                                        storage_envelope_active=False,
                                        storage_envelope_cutover_index=0),
    "storage cutover index while off": change(storage_envelope_active=False),
    "keys not an object": change(keys=[]),
    "key id 0": with_key_named("0"),
    "key id negative": with_key_named("-1"),
    "key id with leading zero": with_key_named("09"),
    "key id over 32 bits": with_key_named(str(2 ** 32)),
    "key id very long": with_key_named("1" * 5000),
    "key id text": with_key_named("one"),
    "key id in other digits": with_key_named("٣"),
    "purpose unknown": change_key(purpose="backup"),
    "purpose a number": change_key(purpose=2),
    "wrapped short": change_key(wrapped=base64.b64encode(WRAPPED[:-1]).decode()),
    "wrapped long": change_key(wrapped=base64.b64encode(WRAPPED + b"x").decode()),
    "wrapped not base64": change_key(wrapped="*" * 80),
    "wrapped with a line end": change_key(wrapped=base64.b64encode(WRAPPED).decode() + "\n"),
    "wrapped with needless padding": change_key(
        wrapped=base64.b64encode(WRAPPED).decode() + "=="),
    "wrapped null": change_key(wrapped=None),
    "epoch over 16 bits": change_key(local_epoch=0x1_0000),
    "epoch negative": change_key(local_epoch=-1),
    "epoch text": change_key(local_epoch="3"),
    "created a number": change_key(created=5),
    "created with a control character": change_key(created="2026\n"),
    "created a lone surrogate": change_key(created="\ud800"),
    "key with another field": change_key(comment=""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_sidecar_is_refused(name: str) -> None:
    with pytest.raises(SidecarCorrupt) as caught:
        parse(DAMAGED[name]())
    assert caught.value.remedy


def test_a_sidecar_cut_at_any_byte_is_refused() -> None:
    data = GOOD.encode()
    for length in range(len(data)):
        with pytest.raises(SidecarCorrupt):
            parse(data[:length])


@settings(max_examples=200)
@given(st.data())
def test_a_changed_byte_is_refused_or_reads_as_a_valid_sidecar(data: st.DataObject) -> None:
    changed = bytearray(GOOD.encode())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        parsed = parse(bytes(changed))
    except SidecarCorrupt:
        return
    assert parse(parsed.encode()) == parsed


@given(st.binary(max_size=100))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        parse(data)


def test_a_contradictory_sidecar_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    store(OsDisk(), path, GOOD)
    with pytest.raises(SidecarCorrupt):
        store(OsDisk(), path, Sidecar(active_storage=1, active_raft=2))
    assert path.read_bytes() == GOOD.encode()
    assert not list(tmp_path.glob("*.tmp"))


def test_store_makes_the_directory_owner_only(tmp_path: Path) -> None:
    path = tmp_path / sidecar_file.RELATIVE_PATH
    store(OsDisk(), path, GOOD)
    assert load(OsDisk(), path) == GOOD
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_file_is_no_sidecar_and_a_leftover_tmp_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert load(OsDisk(), path) is None
    (tmp_path / "keys.json.tmp").write_bytes(GOOD.encode())
    assert load(OsDisk(), path) is None
    (tmp_path / "keys.json.tmp").write_bytes(b"{")
    store(OsDisk(), path, GOOD)
    assert load(OsDisk(), path) == GOOD


def test_a_damaged_file_is_not_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_bytes(b"")
    with pytest.raises(SidecarCorrupt):
        load(OsDisk(), tmp_path / "keys.json")
