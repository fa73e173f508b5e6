"""The durable shell around the rules: one node's key state, applied entry by entry.

    plan (pure, `keys.rules`) -> sidecar durable on disk -> keystore swapped -> rows to the caller

The caller stores the rows in one durable transaction with the applied index. After a crash the
sidecar may thus be ahead of the store, never behind: entries at or below the sidecar's
`raft_applied_index` are *replays* that only return their rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.crypto.nonce import MAX_EPOCH
from elastickv.durable import Disk
from elastickv.errors import (
    EncryptionConflict,
    EntryNotApplicable,
    EpochRollback,
    InvalidArgument,
    KekError,
    NotBootstrapped,
)
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.epochs import with_epochs_at_least
from elastickv.keys.provenance import Contradiction, Recorded, contradiction, rewrapped
from elastickv.keys.registry import ReadRow, own_epochs
from elastickv.keys.rules import Inputs, KeyState, Plan, plan, plan_rows
from elastickv.keys.sidecar import Sidecar
from elastickv.wire import EncryptionEntry, Registration, RegistryRow


def utc_now() -> str:
    """The time for a new key's `created`, RFC 3339 in whole seconds. It differs between members, so
    nothing that they must agree on may depend on it; a leader judges `--dek-max-age` by its own."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Applier:
    """The key state of one node, and the only writer of its sidecar.

    `read_row` reads a registry row from the store. Without KEK, keystore and sidecar path only
    registrations apply; with only some of them too, since a DEK that is installed but not recorded
    (or the reverse) would be lost on restart.
    """

    def __init__(self, *, disk: Disk, read_row: ReadRow, kek: Kek | None = None,
                 keystore: Keystore | None = None, sidecar_path: Path | None = None,
                 full_node_id: int = 0, now: Callable[[], str] = utc_now,
                 on_unwrap: Callable[[float], None] | None = None) -> None:
        """`full_node_id` is this node's own: the sidecar's epochs never fall below the registry
        rows that are written for it. 0 = leave the epochs to `set_local_epoch`. `on_unwrap` is told
        the seconds that each unwrapping took."""
        self._disk = disk
        self._read_row = read_row
        self._kek = kek
        self._path = sidecar_path
        self._full_node_id = full_node_id
        self._now = now
        self._on_unwrap = on_unwrap
        self._has_keystore = keystore is not None
        self._state = KeyState(None, keystore if keystore is not None else Keystore())

    @property
    def sidecar(self) -> Sidecar | None:
        """The sidecar as it is on disk; None before the bootstrap."""
        return self._state.sidecar

    @property
    def keystore(self) -> Keystore:
        """Every DEK of the sidecar, ready for use."""
        return self._state.keystore

    def load(self) -> None:
        """Read the sidecar at start and unwrap every key in it.

        Raises `SidecarCorrupt`, `KekError` when there is no KEK or a key does not unwrap, or
        `EncryptionConflict` when two ids stand for one key.
        """
        if self._path is None:
            return
        sidecar = sidecar_file.load(self._disk, self._path)
        if sidecar is not None:
            self._state = KeyState(sidecar, self._unwrap_all(sidecar))

    def validate(self, index: int, entry: EncryptionEntry) -> None:
        """Run every check of `apply` for an entry about to be proposed at about `index`, with no
        effect. Raises as `apply` does."""
        # A proposal is never a replay, and the checks of a replay are weaker.
        sidecar = self._state.sidecar
        self._plan(max(index, sidecar.raft_applied_index + 1) if sidecar else index, entry)

    def validate_writers(self, rows: Sequence[RegistryRow]) -> None:
        """Run every check of `apply` for registrations of `rows`, one after the other. Raises as
        `apply` does."""
        plan_rows(rows, self._read_row)

    def apply(self, index: int, entry: EncryptionEntry) -> list[tuple[bytes, bytes]]:
        """Apply a committed entry; the registry rows `(key, value)` to store with the index.

        Sidecar and keystore have changed when it returns. Raises `EntryRejected`,
        `EntryNotApplicable`, `SidecarCorrupt` or `DiskFull` with nothing changed, and after the
        last the entry may be applied again; or whatever else the disk raises, and then the node
        must stop.
        """
        result = self._plan(index, entry)
        self._replace_state(self._with_own_epochs(result.state, result.rows))
        return result.rows

    def contradiction(self, recorded: Recorded) -> Contradiction | None:
        """Why this node's sidecar cannot be of the log that `recorded` comes from; None while it
        can be, and without a sidecar."""
        own = self._state.sidecar
        if own is None:
            return None
        return contradiction(own, recorded, rewrapped(self._kek, own, recorded.sidecar))

    def note_registry(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Durably raise this node's epochs to what registry `rows` hold for it, as after a
        snapshot, whose rows come without a log entry."""
        self._replace_state(self._with_own_epochs(self._state, rows))

    def _with_own_epochs(self, state: KeyState, rows: Iterable[tuple[bytes, bytes]]) -> KeyState:
        if not self._full_node_id or state.sidecar is None:
            return state
        sidecar = with_epochs_at_least(state.sidecar, own_epochs(rows, self._full_node_id))
        return state if sidecar is state.sidecar else replace(state, sidecar=sidecar)

    def set_local_epoch(self, dek_id: int, epoch: int) -> None:
        """Durably note the nonce epoch that this node is about to register for `dek_id`.

        Raises `NotBootstrapped` for an unknown DEK, `InvalidArgument` over 0xFFFF, and
        `EpochRollback` below what is noted: an epoch never goes back.
        """
        sidecar = self._state.sidecar
        key = sidecar.keys.get(dek_id) if sidecar is not None else None
        if sidecar is None or key is None:
            raise NotBootstrapped(f"this node's sidecar has no DEK {dek_id}")
        if not 0 <= epoch <= MAX_EPOCH:
            raise InvalidArgument(f"local epoch {epoch} is not in 0..{MAX_EPOCH}")
        if epoch < key.local_epoch:
            raise EpochRollback(f"epoch {epoch} of DEK {dek_id} is below {key.local_epoch},"
                                " which this node already used")
        if epoch > key.local_epoch:
            changed = sidecar.with_key(dek_id, replace(key, local_epoch=epoch))
            self._replace_state(KeyState(changed, self._state.keystore))

    def adopt(self, foreign: Sidecar) -> None:
        """Durably take over another member's sidecar (a snapshot, a resync).

        Epochs are this node's own: known ones are kept, new keys start at 0. Raises `KekError` when
        a key does not unwrap, `EncryptionConflict` when an id stands for another key here or two
        ids stand for one, and `SidecarCorrupt` when `foreign` contradicts itself; then nothing has
        changed.
        """
        own = self._state.sidecar.keys if self._state.sidecar is not None else {}
        keys = {dek_id: replace(key, local_epoch=own[dek_id].local_epoch if dek_id in own else 0)
                for dek_id, key in foreign.keys.items()}
        adopted = replace(foreign, keys=MappingProxyType(keys))
        keystore = self._unwrap_all(adopted)
        for dek_id in keystore.ids():
            held, new = self._state.keystore.get(dek_id), keystore.get(dek_id)
            if held is not None and new is not None and not held.same_key(new):
                raise EncryptionConflict(f"key id {dek_id} stands for another key on this node")
        self._replace_state(KeyState(adopted, keystore))

    def _unwrap_all(self, sidecar: Sidecar) -> Keystore:
        if self._kek is None:
            raise KekError("the data directory holds wrapped keys and no KEK is configured",
                           remedy="start the node with the --kekFile it was bootstrapped with")
        return Keystore({dek_id: self._unwrap(key.wrapped, dek_id, key.purpose)
                         for dek_id, key in sidecar.keys.items()})

    def _plan(self, index: int, entry: EncryptionEntry) -> Plan:
        if not isinstance(entry, Registration):
            self._require_wiring()
        return plan(self._state, index, entry,
                    Inputs(self._read_row, self._unwrap, self._now()))

    def _require_wiring(self) -> None:
        missing = [name for name, present in (
            ("KEK", self._kek is not None), ("keystore", self._has_keystore),
            ("sidecar path", self._path is not None)) if not present]
        if missing:
            raise EntryNotApplicable(
                f"this node cannot apply a key change: it has no {' and no '.join(missing)}",
                remedy="start it with --kekFile and --encryption-enabled")

    def _unwrap(self, wrapped: bytes, dek_id: int, purpose: Purpose) -> KeyHandle:
        if self._kek is None:
            raise KekError("no KEK is configured")
        began = time.perf_counter()
        handle = self._kek.unwrap_handle(wrapped, dek_id, purpose)
        if self._on_unwrap is not None:
            self._on_unwrap(time.perf_counter() - began)
        return handle

    def _replace_state(self, state: KeyState) -> None:
        """Sidecar first and durable, then memory, so that memory never runs ahead of the disk."""
        if state.sidecar is not None and state.sidecar is not self._state.sidecar:
            if self._path is None:
                raise EntryNotApplicable("this node has no sidecar path")
            sidecar_file.store(self._disk, self._path, state.sidecar)
        self._state = state
