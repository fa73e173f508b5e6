"""The sidecar: a node's own record of the cluster's keys, `<dataDir>/encryption/keys.json`.

    {
      "version": 2,
      "raft_applied_index": <index of the last encryption entry in this file>,
      "storage_envelope_active": <bool>,
      "storage_envelope_cutover_index": <index, 0 = none>,
      "raft_envelope_cutover_index": <index, 0 = none>,
      "active": {"storage": <dek id>, "raft": <dek id>},
      "keys": {
        "<dek id, decimal>": {"purpose": "storage" | "raft", "wrapped": <base64 of 60 bytes>,
                              "created": <RFC 3339>, "local_epoch": <0..65535>}, ...
      }
    }

Two-space indent, fields in this order, key ids in string order, no newline at the end: the bytes
that the Go implementation writes. It holds wrapped keys only, so it is safe to leak. Version 1 may
lack `storage_envelope_cutover_index`; what is written is always version 2.

Reading fails closed (`SidecarCorrupt`): an unknown, missing or repeated field, a value of another
type or range, or a contradiction is refused, never guessed around.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from elastickv.crypto.envelope import MAX_KEY_ID
from elastickv.crypto.kek import WRAPPED_BYTES
from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import MAX_EPOCH
from elastickv.durable import Disk
from elastickv.errors import SidecarCorrupt

VERSION: Final = 2
READABLE_VERSIONS: Final = (1, 2)
MAX_INDEX: Final = 0xFFFF_FFFF_FFFF_FFFF
RELATIVE_PATH: Final = Path("encryption") / "keys.json"

_FIELDS = ("version", "raft_applied_index", "storage_envelope_active",
           "storage_envelope_cutover_index", "raft_envelope_cutover_index", "active", "keys")
_KEY_FIELDS = ("purpose", "wrapped", "created", "local_epoch")
_MAX_ID_DIGITS = len(str(MAX_KEY_ID))
_PURPOSES = {purpose.label: purpose for purpose in Purpose}
_REMEDY = "restore it with elastickv admin encryption resync-sidecar"


@dataclass(frozen=True, slots=True)
class SidecarKey:
    """One wrapped DEK. `local_epoch` is the highest nonce epoch this node wrote down for it."""

    purpose: Purpose
    wrapped: bytes
    created: str
    local_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The whole file. Indexes are log indexes, 0 = none; id 0 in `active_*` = not bootstrapped."""

    raft_applied_index: int = 0
    storage_envelope_active: bool = False
    storage_envelope_cutover_index: int = 0
    raft_envelope_cutover_index: int = 0
    active_storage: int = 0
    active_raft: int = 0
    keys: Mapping[int, SidecarKey] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def bootstrapped(self) -> bool:
        """Whether the cluster has DEKs."""
        return self.active_storage != 0

    @property
    def active_ids(self) -> tuple[int, ...]:
        """The DEK ids that new ciphertext uses; none before the bootstrap."""
        return (self.active_storage, self.active_raft) if self.bootstrapped else ()

    def active(self, purpose: Purpose) -> int:
        """The DEK id that new ciphertext of `purpose` uses; 0 before the bootstrap."""
        return self.active_storage if purpose == Purpose.STORAGE else self.active_raft

    def is_cut_over(self, purpose: Purpose) -> bool:
        """Whether the cutover of `purpose` has been made."""
        return self.storage_envelope_active if purpose is Purpose.STORAGE \
            else self.raft_envelope_cutover_index != 0

    def holds_active(self, purpose: Purpose, dek_id: int, wrapped: bytes) -> bool:
        """Whether this very DEK, in this wrapping, is the active one of `purpose`."""
        return bool(dek_id) and self.active(purpose) == dek_id \
            and self.keys[dek_id].wrapped == wrapped

    def claims(self, index: int) -> bool:
        """Whether this file says that entry `index` is a bootstrap, a rotation or a cutover."""
        return index in (self.raft_applied_index, self.storage_envelope_cutover_index,
                         self.raft_envelope_cutover_index)

    def with_key(self, dek_id: int, key: SidecarKey) -> Sidecar:
        """A copy in which `dek_id` stands for `key`."""
        return replace(self, keys=MappingProxyType({**self.keys, dek_id: key}))

    def validate(self) -> None:
        """Raise `SidecarCorrupt` unless every field is in range and none contradicts another."""
        for name in ("raft_applied_index", "storage_envelope_cutover_index",
                     "raft_envelope_cutover_index"):
            _require(0 <= getattr(self, name) <= MAX_INDEX, f"{name} is out of range")
        for dek_id, key in self.keys.items():
            _validate_key(dek_id, key)
        for purpose in Purpose:
            self._validate_active(purpose)
        _require((self.active_storage == 0) == (self.active_raft == 0),
                 "only one of active.storage and active.raft is set")
        _require(self.bootstrapped or not self.storage_envelope_active,
                 "the storage envelope is active without an active key")
        _require(self.bootstrapped or self.raft_envelope_cutover_index == 0,
                 "the raft envelope is active without an active key")
        _require(self.storage_envelope_active or self.storage_envelope_cutover_index == 0,
                 "storage_envelope_cutover_index is set but the envelope is not active")

    def _validate_active(self, purpose: Purpose) -> None:
        dek_id = self.active(purpose)
        if dek_id == 0:
            return
        key = self.keys.get(dek_id)
        _require(key is not None, f"active.{purpose.label} names key {dek_id}, which is missing")
        _require(key is None or key.purpose is purpose,
                 f"active.{purpose.label} names key {dek_id}, which has another purpose")

    def encode(self) -> bytes:
        """The file's bytes. Raises `SidecarCorrupt` for a sidecar that could not be read back."""
        self.validate()
        document = {
            "version": VERSION,
            "raft_applied_index": self.raft_applied_index,
            "storage_envelope_active": self.storage_envelope_active,
            "storage_envelope_cutover_index": self.storage_envelope_cutover_index,
            "raft_envelope_cutover_index": self.raft_envelope_cutover_index,
            "active": {"storage": self.active_storage, "raft": self.active_raft},
            "keys": {str(dek_id): _key_document(self.keys[dek_id])
                     for dek_id in sorted(self.keys, key=str)},
        }
        return json.dumps(document, indent=2, ensure_ascii=False).encode()


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise SidecarCorrupt(f"the sidecar is damaged: {problem}", remedy=_REMEDY)


def _validate_key(dek_id: int, key: SidecarKey) -> None:
    _require(1 <= dek_id <= MAX_KEY_ID, f"key id {dek_id} is out of range")
    _require(isinstance(key.purpose, Purpose), f"key {dek_id} has no known purpose")
    _require(len(key.wrapped) == WRAPPED_BYTES,
             f"key {dek_id} is wrapped in {len(key.wrapped)} bytes, must be {WRAPPED_BYTES}")
    _require(0 <= key.local_epoch <= MAX_EPOCH, f"the epoch of key {dek_id} is out of range")
    _require(key.created.isascii() and key.created.isprintable(),
             f"created of key {dek_id} is not a time stamp")


def _key_document(key: SidecarKey) -> dict[str, Any]:
    return {"purpose": key.purpose.label, "wrapped": base64.b64encode(key.wrapped).decode(),
            "created": key.created, "local_epoch": key.local_epoch}


# --- parsing ---------------------------------------------------------------------------------


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    _require(len(document) == len(pairs), "a field occurs twice")
    return document


def _object(value: object, fields: tuple[str, ...], what: str) -> dict[str, Any]:
    _require(isinstance(value, dict), f"{what} is not an object")
    if not isinstance(value, dict) or set(value) != set(fields):
        names = sorted(set(value) ^ set(fields)) if isinstance(value, dict) else []
        raise SidecarCorrupt(
            f"the sidecar is damaged: {what} has unknown or missing fields {names}",
            remedy=_REMEDY)
    return value


def _integer(value: object, what: str) -> int:
    # bool is an int in Python but not in the file.
    _require(type(value) is int, f"{what} is not an integer")
    return value if isinstance(value, int) else 0


def _parse_key(name: str, value: object) -> tuple[int, SidecarKey]:
    _require(name.isascii() and name.isdecimal() and len(name) <= _MAX_ID_DIGITS
             and not name.startswith("0"), "a key id is not a decimal number in 1..2^32-1")
    document = _object(value, _KEY_FIELDS, f"key {name}")
    purpose, wrapped, created = document["purpose"], document["wrapped"], document["created"]
    _require(isinstance(purpose, str) and purpose in _PURPOSES, f"key {name} has no known purpose")
    _require(isinstance(created, str), f"created of key {name} is not a string")
    _require(isinstance(wrapped, str), f"wrapped of key {name} is not a string")
    try:
        raw = base64.b64decode(wrapped, validate=True)
    except (binascii.Error, ValueError):
        raise SidecarCorrupt(f"the sidecar is damaged: key {name} is not base64",
                             remedy=_REMEDY) from None
    _require(base64.b64encode(raw).decode() == wrapped, f"key {name} is not canonical base64")
    return int(name), SidecarKey(_PURPOSES[purpose], raw, created,
                                 _integer(document["local_epoch"], f"local_epoch of key {name}"))


def parse(data: bytes) -> Sidecar:
    """The sidecar in a file's bytes, validated. Raises `SidecarCorrupt`."""
    try:
        document = json.loads(data.decode(), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError):
        raise SidecarCorrupt("the sidecar is damaged: not JSON", remedy=_REMEDY) from None
    if isinstance(document, dict) and document.get("version") == 1:
        document.setdefault("storage_envelope_cutover_index", 0)
    fields = _object(document, _FIELDS, "the file")
    if _integer(fields["version"], "version") not in READABLE_VERSIONS:
        raise SidecarCorrupt(f"the sidecar has version {fields['version']}; this build reads"
                             f" {READABLE_VERSIONS}", remedy="run a build that knows this version")
    active = _object(fields["active"], ("storage", "raft"), "active")
    storage_active = fields["storage_envelope_active"]
    _require(type(storage_active) is bool, "storage_envelope_active is not a boolean")
    _require(isinstance(fields["keys"], dict), "keys is not an object")
    sidecar = Sidecar(
        raft_applied_index=_integer(fields["raft_applied_index"], "raft_applied_index"),
        storage_envelope_active=storage_active,
        storage_envelope_cutover_index=_integer(fields["storage_envelope_cutover_index"],
                                                "storage_envelope_cutover_index"),
        raft_envelope_cutover_index=_integer(fields["raft_envelope_cutover_index"],
                                             "raft_envelope_cutover_index"),
        active_storage=_integer(active["storage"], "active.storage"),
        active_raft=_integer(active["raft"], "active.raft"),
        keys=MappingProxyType(dict(_parse_key(*item) for item in fields["keys"].items())))
    sidecar.validate()
    return sidecar


# --- the file --------------------------------------------------------------------------------


def load(disk: Disk, path: Path) -> Sidecar | None:
    """The sidecar on disk, None when there is none. A leftover `.tmp` is never read.

    Raises `SidecarCorrupt`.
    """
    try:
        return parse(disk.read(path))
    except FileNotFoundError:
        return None


def store(disk: Disk, path: Path, sidecar: Sidecar) -> None:
    """Durably replace the file; when this returns the new content survives a power cut.

    Raises `SidecarCorrupt` before anything is written, or what the disk raises.
    """
    data = sidecar.encode()
    if not disk.exists(path.parent):
        disk.make_directory(path.parent)
    disk.replace(path, data)
