"""Sealing records and log entries: what is active, who may, and how many times.

The hot path of the leader. Everything is decided from the applied state at the moment of sealing;
between that decision and the last nonce taken nothing yields to the loop.
"""

from __future__ import annotations

from elastickv.crypto.cipher import seal_raft
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.errors import DekExhausted, IntegrityError
from elastickv.keys.applier import Applier
from elastickv.kv.own_entries import OwnEntries
from elastickv.kv.txn import Sealer
from elastickv.kv.usage import NonceBudgets
from elastickv.store.values import plain_record, seal_record
from elastickv.wire import Entry


class Sealing:
    """Seals for one process. `own_entries` is told of what goes into the log."""

    def __init__(self, applier: Applier, budgets: NonceBudgets,
                 own_entries: OwnEntries | None = None) -> None:
        self._applier = applier
        self._budgets = budgets
        self._own_entries = own_entries if own_entries is not None else OwnEntries()

    def active_deks(self) -> dict[Purpose, int]:
        """The DEKs that something is sealed under now; empty before the storage cutover."""
        sidecar = self._applier.sidecar
        if sidecar is None:
            return {}
        active = {}
        if sidecar.storage_envelope_active:
            active[Purpose.STORAGE] = sidecar.active_storage
        if sidecar.raft_envelope_cutover_index:
            active[Purpose.RAFT] = sidecar.active_raft
        return active

    def record_sealer(self, count: int = 1) -> Sealer | None:
        """What makes the next `count` records: plain before the storage cutover, sealed after it;
        None while this node may not seal that many."""
        sidecar = self._applier.sidecar
        if sidecar is None or not sidecar.storage_envelope_active:
            return _plain_sealer
        nonces = self._budgets.take(sidecar.active_storage, count)
        if nonces is None:
            return None
        handle = _require_handle(self._applier.keystore, sidecar.active_storage)
        next_nonce = nonces.next

        def seal(user_key: bytes, commit_ts: int, plaintext: bytes, expiry_ms: int) -> bytes:
            return seal_record(handle, next_nonce(), user_key, commit_ts, plaintext, expiry_ms)

        return seal

    def entry_ready(self, *, beyond_limit: bool = False) -> bool:
        """Whether `seal_entry` would seal now; if not, work on it has begun."""
        sidecar = self._applier.sidecar
        if sidecar is None or sidecar.raft_envelope_cutover_index == 0:
            return True
        return self._budgets.take(sidecar.active_raft, 1, beyond_limit=beyond_limit) is not None

    def seal_entry(self, payload: bytes, *, beyond_limit: bool = False,
                   entry: Entry | None = None) -> bytes | None:
        """The form in which `payload` goes into the log; None while it may not be sealed. `entry`
        is what it was encoded from, where that is to be applied without decoding."""
        sidecar = self._applier.sidecar
        if sidecar is None or sidecar.raft_envelope_cutover_index == 0:
            if entry is not None:
                self._own_entries.add(payload, entry, is_sealed=False)
            return payload
        nonces = self._budgets.take(sidecar.active_raft, 1, beyond_limit=beyond_limit)
        if nonces is None:
            return None
        handle = _require_handle(self._applier.keystore, sidecar.active_raft)
        sealed = seal_raft(handle, nonces.next(), payload)
        if entry is not None:
            self._own_entries.add(sealed, entry, is_sealed=True)
        return sealed

    def prepare(self) -> None:
        """Begin whatever the first seal would have to wait for, as on becoming leader."""
        for dek_id in self.active_deks().values():
            self._budgets.take(dek_id, 1)

    def refusal(self) -> DekExhausted | None:
        """Why user writes cannot be sealed until a DEK is rotated; None while they can."""
        if not self._budgets.any_spent:
            return None
        for purpose, dek_id in self.active_deks().items():
            if self._budgets.is_spent(dek_id):
                return DekExhausted(
                    f"{purpose.label} DEK {dek_id} has been used for"
                    f" {self._budgets.limits.max_writes} writes, the limit of --dek-max-writes",
                    remedy="rotate it: elastickv admin encryption rotate-dek"
                           f" --purpose {purpose.label}")
        return None


def _require_handle(keystore: Keystore, dek_id: int) -> KeyHandle:
    handle = keystore.get(dek_id)
    if handle is None:
        raise IntegrityError(f"active DEK {dek_id} is not in the keystore",
                             remedy="restore this node's sidecar from the leader")
    return handle


def _plain_sealer(user_key: bytes, commit_ts: int, plaintext: bytes, expiry_ms: int) -> bytes:
    return plain_record(plaintext, expiry_ms)
