"""Restoring a sidecar: from the leader, by itself at start or by `resync-sidecar`; or, when no
leader answers and there is no sidecar that can be read, from the copy in the node's own store.

The store's copy is that of the last encryption entry whose effects the store holds. Later ones are
in the log and are applied again, this node's own registrations too, which raise its epochs. That
the copy's epochs may be old is harmless: whoever leads has applied every committed registration,
and confirms an epoch only above those.

The rules are in `keys.resync`; here are the asking, the checks that need the KEK, and the writing.
The node must not run meanwhile; every caller holds the data directory's lock.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from elastickv import contacts, logs, startup
from elastickv.client import Client
from elastickv.client import SidecarState as LeaderState
from elastickv.config import NodeSettings
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore, Purpose
from elastickv.crypto.nonce import full_node_id
from elastickv.data_directory import file_failure, program
from elastickv.durable import Disk
from elastickv.errors import (
    DiskFailed,
    DiskFull,
    ElasticKVError,
    EncryptionConflict,
    KekError,
    OperatorError,
    PeerError,
    SidecarCorrupt,
)
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.epochs import with_epochs_at_least
from elastickv.keys.guards import (
    RESYNC_COMMAND,
    WRONG_KEK_REMEDY,
    DataDirectoryUnusable,
    EpochExhausted,
    GuardFailed,
    KekDoesNotUnwrap,
    failures,
)
from elastickv.keys.provenance import unopened
from elastickv.keys.registry import own_epochs
from elastickv.keys.resync import resynced
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar, SidecarKey
from elastickv.store.mvcc_store import Store

LEADER_TIMEOUT_S = 8.0
"""How long a node that may not start looks for the leader before it gives up."""

_OF_THIS_DISK = (DataDirectoryUnusable, DiskFailed, DiskFull)
"""What says by itself what is to be done."""

log = logs.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Resynced:
    """What was written, and what stood there: None when nothing readable did."""

    before: Sidecar | None
    after: Sidecar


def leader_sidecar(state: LeaderState) -> Sidecar:
    """The leader's key state in its answer, without epochs.

    Raises `OperatorError` when the leader does not tell everything a sidecar needs, and
    `SidecarCorrupt` when it contradicts itself.
    """
    if not state.wrapped_deks_by_id:
        return Sidecar()
    if not state.sidecar_index or set(state.purposes_by_id) != set(state.wrapped_deks_by_id):
        raise OperatorError("the leader does not tell all that a sidecar needs",
                            remedy="run the same version on every member")
    known = {int(purpose) for purpose in Purpose}
    if not known.issuperset(state.purposes_by_id.values()):
        raise SidecarCorrupt("the leader names a purpose that this version does not know",
                             remedy="run the same version on every member")
    keys = {dek_id: SidecarKey(Purpose(state.purposes_by_id[dek_id]), wrapped,
                               state.created_by_id.get(dek_id, ""))
            for dek_id, wrapped in state.wrapped_deks_by_id.items()}
    return Sidecar(
        raft_applied_index=state.sidecar_index,
        storage_envelope_active=state.storage_envelope_active,
        storage_envelope_cutover_index=state.storage_envelope_cutover_index,
        raft_envelope_cutover_index=state.raft_envelope_cutover_index,
        active_storage=state.active_storage_id, active_raft=state.active_raft_id,
        keys=MappingProxyType(keys))


def check_keys(own: Sidecar | None, new: Sidecar, kek: Kek) -> None:
    """Every key of `new` must open under this node's KEK, and no id may stand for another key here.
    What does not open here is damaged, and stands for none.

    Raises `KekError`, `EncryptionConflict`.
    """
    keystore = Keystore()
    for dek_id, key in new.keys.items():
        keystore = keystore.with_key(kek.unwrap_handle(key.wrapped, dek_id, key.purpose))
    damaged = unopened(kek, own) if own is not None else ()
    for dek_id, key in (own.keys.items() if own is not None else ()):
        held = keystore.get(dek_id)
        if held is not None and dek_id not in damaged and not held.same_key(
                kek.unwrap_handle(key.wrapped, dek_id, key.purpose)):
            raise EncryptionConflict(
                f"DEK {dek_id} is another key here than on the leader",
                remedy="this sidecar is from another cluster: move it away, then resync")


async def take_over(client: Client, raft_id: str, kek: Kek, disk: Disk, data_directory: Path,
                    rows: Iterable[tuple[bytes, bytes]] = ()) -> Resynced:
    """Ask the leader through `client`, check, and durably write the sidecar.

    `rows` are this node's own writer rows. Raises what the rules and the call raise, and
    `DataDirectoryUnusable`, `DiskFailed` or `DiskFull` when the sidecar cannot be read or written;
    then nothing has changed.
    """
    node_id = full_node_id(raft_id)
    path = data_directory / RELATIVE_PATH
    try:
        own = sidecar_file.load(disk, path)
    except (SidecarCorrupt, IsADirectoryError):
        own = None
    except OSError as error:
        raise file_failure(error) from None
    state = await client.encryption.resync_sidecar(node_id)
    registry = dict(state.writer_registry)
    for dek_id, epoch in own_epochs(rows, node_id).items():
        registry[dek_id] = max(epoch, registry.get(dek_id, 0))
    new = resynced(own, leader_sidecar(state), registry)
    check_keys(own, new, kek)
    _write(disk, path, new)
    return Resynced(own, new)


def take_stored(stored: Sidecar, raft_id: str, kek: Kek, disk: Disk, path: Path,
                rows: Iterable[tuple[bytes, bytes]]) -> Sidecar:
    """Check `stored`, the copy in the node's own store, and durably write it as the sidecar at
    `path`; what was written.

    `rows` are the store's own writer rows. Raises as `check_keys` does; then nothing has changed.
    """
    check_keys(None, stored, kek)
    new = with_epochs_at_least(stored, own_epochs(rows, full_node_id(raft_id)))
    _write(disk, path, new)
    return new


def _write(disk: Disk, path: Path, sidecar: Sidecar) -> None:
    try:
        sidecar_file.store(disk, path, sidecar)
    except IsADirectoryError:
        raise OperatorError(f"{path} is a directory", remedy="move it away") from None
    except OSError as error:
        raise file_failure(error) from None


def command_line(settings: NodeSettings, endpoints: Sequence[str]) -> str:
    """What the node's user is to type on this machine to resync this node by hand, in whatever
    directory, with the node's own certificate."""
    arguments = ["--raftId", settings.raft_id,
                 "--raftDataDir", str(settings.raft_data_dir.absolute()),
                 "--kekFile", str(settings.kek_file and settings.kek_file.absolute()),
                 "--endpoints", ",".join(endpoints) or "<a member>"]
    tls = settings.tls
    if tls is None:
        arguments.append("--insecure")
    else:
        arguments += ["--tls-ca", str(tls.ca.absolute()), "--tls-cert", str(tls.cert.absolute()),
                      "--tls-key", str(tls.key.absolute())]
    return f"{program()} {RESYNC_COMMAND.partition(' ')[2]} {shlex.join(arguments)}"


async def repair(settings: NodeSettings, disk: Disk, store: Store,
                 gathered: startup.Gathered) -> bool:
    """Take the key state over from the leader if that is all that keeps this node from starting;
    when no leader answers and no sidecar can be read, from the store.

    False when there is nothing to repair this way. Raises the guard's error when neither can be
    had: with the command to run if no leader answered, else with what keeps this node from taking
    over what it answered; `KekDoesNotUnwrap`, and what the node's own disk raises.
    """
    failed = failures(gathered.facts)
    if not failed or gathered.kek is None or not all(failure.resync for failure in failed):
        return False
    attempt = _Repair(settings, disk, store, gathered.kek, failed[0])
    reason = await attempt.from_leader()
    if reason:
        facts = gathered.facts
        attempt.from_store(facts.recorded.sidecar, reason, is_readable=facts.sidecar is not None)
    return True


class _Repair:
    """The two sources of a sidecar for a node that `failure` keeps from starting."""

    def __init__(self, settings: NodeSettings, disk: Disk, store: Store, kek: Kek,
                 failure: GuardFailed) -> None:
        self._settings = settings
        self._disk = disk
        self._store = store
        self._kek = kek
        self._failure = failure
        self._endpoints = [contact.address
                           for contact in contacts.load(disk, settings.raft_data_dir)
                           if contact.address and contact.node_id != settings.raft_id]

    async def from_leader(self) -> str:
        """"" once it is done, or why no leader answered. Raises what keeps this node from taking
        over what it answered."""
        settings, failure = self._settings, self._failure
        if not self._endpoints:
            return "no other member is known"
        log.warning("asking the leader for the key state", guard=failure.guard,
                    endpoints=self._endpoints)
        try:
            async with Client(self._endpoints, tls=settings.tls,
                              timeout_s=LEADER_TIMEOUT_S) as client:
                done = await take_over(client, settings.raft_id, self._kek, self._disk,
                                       settings.raft_data_dir, self._store.rows())
        except PeerError as error:
            return error.message
        except KekError as error:
            raise KekDoesNotUnwrap(error.message, remedy=WRONG_KEK_REMEDY) from None
        except _OF_THIS_DISK:
            raise
        except ElasticKVError as error:
            why = error.problem if isinstance(error, GuardFailed) else error.message
            raise type(failure)(
                f"{failure.problem}; the leader's key state cannot be taken over: {why}",
                remedy=error.remedy or failure.remedy) from None
        log.warning("sidecar restored from the leader", guard=failure.guard,
                    from_index=done.before.raft_applied_index if done.before else 0,
                    to_index=done.after.raft_applied_index)
        return ""

    def from_store(self, stored: Sidecar | None, reason: str, *, is_readable: bool) -> None:
        """Take the store's copy, if there is one, in place of a sidecar that is not `is_readable`:
        of two that are, the store may be the wrong one. `reason`: why the leader's cannot be had.
        """
        settings = self._settings
        if stored is None:
            raise self._refusal(reason)
        if is_readable:
            # With the copy this node's epochs would be used up all the same.
            raise self._refusal(reason, "" if isinstance(self._failure, EpochExhausted) else
                                "; if there can be none without this node, move"
                                f" {settings.raft_data_dir / RELATIVE_PATH} away and start the"
                                " node, which takes its store's copy")
        try:
            new = take_stored(stored, settings.raft_id, self._kek, self._disk,
                              settings.raft_data_dir / RELATIVE_PATH, self._store.rows())
        except KekError as error:
            raise KekDoesNotUnwrap(error.message, remedy=WRONG_KEK_REMEDY) from None
        except _OF_THIS_DISK:
            raise
        except ElasticKVError as error:
            raise self._refusal(f"{reason}; the store's copy cannot be used: {error.message}") \
                from None
        log.warning("sidecar restored from the store", guard=self._failure.guard, leader=reason,
                    to_index=new.raft_applied_index)

    def _refusal(self, reason: str, without_leader: str = "") -> GuardFailed:
        failure = self._failure
        return type(failure)(f"{failure.problem}; the leader could not be asked: {reason}",
                             remedy=f"start the node when a leader is up{without_leader}, or run,"
                                    " as the node's user: "
                                    + command_line(self._settings, self._endpoints))
