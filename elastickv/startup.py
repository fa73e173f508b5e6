"""Gathers the facts that the start-up guards judge, and judges for `elastickv doctor` what a node
finds out after them. Reads only, apart from the file-system probe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from elastickv import audit, contacts, data_directory
from elastickv.config import NodeSettings
from elastickv.crypto.kek import Kek
from elastickv.crypto.kek_file import FileKekProvider
from elastickv.crypto.keystore import KeyHandle, Keystore
from elastickv.crypto.nonce import full_node_id
from elastickv.durable import PROBE_FILE, Disk, probe_file_system
from elastickv.errors import (
    ElasticKVError,
    EncryptionConflict,
    KekTooOpen,
    RemovedFromCluster,
    StartupRefused,
)
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.guards import Facts, FileSystemUnsafe, Problem, Status, Verdict
from elastickv.keys.provenance import Recorded, rewrapped, unopened
from elastickv.keys.registry import WRITERS_PREFIX
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar
from elastickv.kv.fsm import (
    META_LAST_ENCRYPTION_INDEX,
    META_RAFT_CUTOVER_INDEX,
    META_SIDECAR,
)
from elastickv.raft import configuration_file, peer_memory
from elastickv.raft.configuration_file import ConfigurationFile
from elastickv.raft.hardstate import FILE_NAME as HARD_STATE
from elastickv.raft.hardstate import HardStateFile, owner_of
from elastickv.raft.install_marker import MARKER_FILE_NAME, MarkerFile
from elastickv.raft.membership import Configuration, require_own_address
from elastickv.raft.peer_memory import PeerMemory
from elastickv.store.inspection import inspect
from elastickv.store.mvcc_store import decode_number


class NoCluster(StartupRefused):
    """The node neither founds a cluster, nor joins one, nor has been in one."""

    guard = "cluster"


class StoredFacts(Protocol):
    """The part of a store that guards look at."""

    def rows(self, prefix: bytes = b"") -> Iterable[tuple[bytes, bytes]]: ...

    def meta(self, name: bytes) -> bytes | None: ...

    @property
    def applied_index(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Gathered:
    """The facts, and the KEK where it could be loaded."""

    facts: Facts
    kek: Kek | None


def examine(settings: NodeSettings, disk: Disk) -> Facts:
    """The facts of a node that is not to be started, for `elastickv doctor`.

    A node may run on the directory meanwhile, or start. Its store is read before its sidecar, so
    that what is seen is a state that a crash could have left: the sidecar may be ahead, never
    behind.
    """
    seen = data_directory.look(settings.raft_data_dir)
    members = {contact.node_id: full_node_id(contact.node_id)
               for contact in contacts.load(disk, settings.raft_data_dir)}
    members |= {member.node_id: full_node_id(member.node_id)
                for member in settings.founding_members or settings.raft_join}
    store: StoredFacts | None = None
    problem = ""
    try:
        store = inspect(settings.raft_data_dir / "store", in_use=seen.in_use)
    except ElasticKVError as error:
        problem = error.message
    except OSError as error:
        problem = f"the store cannot be read: {error.strerror}"
    # The node has its probe to itself, since it holds the directory's lock.
    gathered = gather(settings, disk, store, members, store_problem=problem,
                      probe_file=f"{PROBE_FILE}-{os.getpid()}")
    return replace(gathered.facts, directory_problem=Problem(seen.problem, seen.remedy)
                   if seen.problem else None)


def require_file_system(settings: NodeSettings, disk: Disk) -> None:
    """The first guard on its own, before anything is opened that could fail on the same cause.

    Raises `FileSystemUnsafe`.
    """
    problem = _probe(settings, disk)
    if problem is not None:
        raise FileSystemUnsafe(problem.message, remedy=problem.remedy)


def gather(settings: NodeSettings, disk: Disk, store: StoredFacts | None,
           member_ids: Mapping[str, int], *, store_problem: str = "",
           probe_file: str = PROBE_FILE) -> Gathered:
    """Everything that `keys.guards` wants to know.

    `store` None = the node never ran, or its store cannot be opened: `store_problem` says why.
    """
    file_system_problem = _probe(settings, disk, probe_file)
    kek, kek_error = _load_kek(settings)
    sidecar, sidecar_problem = _load_sidecar(settings, disk)
    damage = _key_damage(kek, sidecar)
    if damage:
        sidecar, sidecar_problem = None, damage
    unwrap_problem, key_problem = _key_problems(kek, sidecar)
    stored_sidecar, stored_problem = _stored_sidecar(store)
    recorded = Recorded(
        store.applied_index, decode_number(store.meta(META_LAST_ENCRYPTION_INDEX)),
        decode_number(store.meta(META_RAFT_CUTOVER_INDEX)), stored_sidecar) if store else Recorded()
    return Gathered(Facts(
        full_node_id=full_node_id(settings.raft_id),
        raft_id=settings.raft_id,
        directory_owner=_owner(settings, disk),
        encryption_enabled=settings.encryption_enabled,
        kek_configured=settings.kek_file is not None,
        file_system_problem=file_system_problem,
        store_problem=store_problem or stored_problem,
        kek_problem=Problem(kek_error.message, kek_error.remedy) if kek_error else None,
        kek_insecure=isinstance(kek_error, KekTooOpen),
        sidecar=sidecar,
        sidecar_problem=sidecar_problem or key_problem,
        unwrap_problem=unwrap_problem,
        registry=dict(store.rows(WRITERS_PREFIX)) if store else {},
        recorded=recorded,
        has_no_log=_has_no_log(settings, disk),
        rewrapped=rewrapped(kek, sidecar, stored_sidecar),
        member_ids=member_ids), kek)


def require_cluster(settings: NodeSettings, disk: Disk, applied_index: int = 0) -> None:
    """Refuse a node that nothing tells of a cluster: neither its settings nor its disk.

    Raises `NoCluster`, or `JournalCorrupt`.
    """
    if settings.raft_join or settings.founding_members or applied_index:
        return
    # Entries may be in the log that no flush has brought to the store yet.
    base = _base_configuration(settings, disk)
    if base is None or not base.members:
        raise NoCluster(
            f"{settings.raft_id} belongs to no cluster, by what is in {settings.raft_data_dir}",
            remedy="if it has run before, check that --raftDataDir is its directory and that the"
                   " disk is mounted; if the disk is new, remove the member and join it anew; for a"
                   " new node give --raftJoin to join one, or --raftBootstrap or"
                   " --raftBootstrapMembers to found one")


def later_verdicts(settings: NodeSettings, disk: Disk) -> list[Verdict]:
    """What would end the start of a node after the guards, as far as it is cheap to tell: the log
    is not read. The last one only warns."""
    checks: Sequence[tuple[str, Callable[[], None]]] = (
        ("raft-files", lambda: _require_raft_files(settings, disk)),
        ("cluster", lambda: require_cluster(settings, disk)),
        ("raft-address", lambda: _require_raft_address(settings, disk)),
        ("member", lambda: _require_member(settings, disk)),
        ("audit-log", lambda: audit.require_usable(settings.audit_file, settings.raft_data_dir)),
    )
    return [*(_verdict(name, check) for name, check in checks), _user(settings)]


def _verdict(name: str, check: Callable[[], None]) -> Verdict:
    try:
        check()
    except (ElasticKVError, OSError) as error:
        failure = data_directory.file_failure(error) if isinstance(error, OSError) else error
        return Verdict(name, Status.FAIL, getattr(failure, "problem", failure.message),
                       failure.remedy)
    return Verdict(name, Status.PASS)


def _require_raft_files(settings: NodeSettings, disk: Disk) -> None:
    directory = settings.raft_data_dir / "raft"
    _hard_state(settings, disk)
    _base_configuration(settings, disk)
    MarkerFile(disk, directory / MARKER_FILE_NAME).load()
    PeerMemory(disk, directory / peer_memory.FILE_NAME)


def _hard_state(settings: NodeSettings, disk: Disk) -> HardStateFile:
    return HardStateFile(disk, settings.raft_data_dir / "raft" / HARD_STATE)


def _base_configuration(settings: NodeSettings, disk: Disk) -> Configuration | None:
    path = settings.raft_data_dir / "raft" / configuration_file.FILE_NAME
    return ConfigurationFile(disk, path).load()


def _require_raft_address(settings: NodeSettings, disk: Disk) -> None:
    """By the configuration that the log begins with: what the log says of it, the node finds."""
    base = _base_configuration(settings, disk)
    joins = settings.raft_join and not _hard_state(settings, disk).state.joined
    if base is not None and not joins:
        require_own_address(base, settings.raft_id, str(settings.raft_address))


def _require_member(settings: NodeSettings, disk: Disk) -> None:
    """A node that was removed knew the members without it when it last ran."""
    base = _base_configuration(settings, disk)
    was_member = _hard_state(settings, disk).state.joined or (
        base is not None and base.find(settings.raft_id) is not None)
    known = {contact.node_id for contact in contacts.load(disk, settings.raft_data_dir)}
    if was_member and known and settings.raft_id not in known:
        raise RemovedFromCluster(
            f"member {settings.raft_id} was not among the members when it last ran",
            remedy="if elastickv admin raft status on another member does not list it either, it"
                   " was removed: it may join again with an empty data directory")


def _user(settings: NodeSettings) -> Verdict:
    owner = data_directory.other_owner(settings.raft_data_dir)
    if owner:
        return Verdict("user", Status.WARN,
                       f"the node last ran as user {owner}, and this is another user: whether the"
                       " node can use its files is not told here",
                       data_directory.as_user(owner, "doctor ..."))
    return Verdict("user", Status.PASS)


def _owner(settings: NodeSettings, disk: Disk) -> str:
    try:
        return owner_of(disk, settings.raft_data_dir / "raft")
    except (ElasticKVError, OSError):
        return ""  # the engine says what is wrong with it, and `later_verdicts`


def _has_no_log(settings: NodeSettings, disk: Disk) -> bool:
    # The engine makes both when it starts, before there is an entry.
    raft = settings.raft_data_dir / "raft"
    try:
        return not disk.exists(raft / HARD_STATE) and not disk.exists(raft / "log")
    except OSError:
        return False  # the engine says what is wrong with it


def _probe(settings: NodeSettings, disk: Disk, name: str = PROBE_FILE) -> Problem | None:
    """What is wrong with the file system; None when nothing is."""
    # What does not exist yet will be made in the nearest directory that does.
    directory = settings.raft_data_dir.absolute()
    try:
        existing = next(path for path in (directory, *directory.parents) if disk.exists(path))
        probe_file_system(disk, existing, name, directory)
    except ElasticKVError as error:
        return Problem(error.message, error.remedy)
    except OSError as error:
        return Problem(f"{directory} cannot be reached: {error.strerror}",
                       "put --raftDataDir on a local ext4 or xfs file system that takes writes")
    return None


def _load_kek(settings: NodeSettings) -> tuple[Kek | None, ElasticKVError | None]:
    if settings.kek_file is None:
        return None, None
    try:
        return FileKekProvider(settings.kek_file).load(), None
    except ElasticKVError as error:
        return None, error


def _load_sidecar(settings: NodeSettings, disk: Disk) -> tuple[Sidecar | None, str]:
    try:
        return sidecar_file.load(disk, settings.raft_data_dir / RELATIVE_PATH), ""
    except ElasticKVError as error:
        return None, error.message
    except OSError as error:
        return None, f"the sidecar cannot be read: {error.strerror}"


def _stored_sidecar(store: StoredFacts | None) -> tuple[Sidecar | None, str]:
    content = store.meta(META_SIDECAR) if store is not None else None
    if content is None:
        return None, ""
    try:
        return sidecar_file.parse(content), ""
    except ElasticKVError as error:
        return None, f"the store's record of the key state: {error.message}"


def _key_damage(kek: Kek | None, sidecar: Sidecar | None) -> str:
    """Which key is damaged, in a sidecar that parses: one that a KEK does not open which opens
    others. A KEK that opens none is another one."""
    closed = unopened(kek, sidecar) if kek is not None and sidecar is not None else set()
    if not closed or sidecar is None or len(closed) == len(sidecar.keys):
        return ""
    return f"the sidecar is damaged: the KEK opens other DEKs of it, and not DEK {min(closed)}"


def _key_problems(kek: Kek | None, sidecar: Sidecar | None) -> tuple[str, str]:
    """Why a key does not unwrap, and why those that do cannot be the cluster's. A wrapping binds
    no id: whoever can write the disk can put one key under two ids, and no nonce would be safe."""
    if kek is None:
        return "no KEK is loaded" if sidecar is not None else "", ""
    handles: dict[int, KeyHandle] = {}
    for dek_id, key in (sidecar.keys if sidecar else {}).items():
        try:
            handles[dek_id] = kek.unwrap_handle(key.wrapped, dek_id, key.purpose)
        except ElasticKVError as error:
            return f"DEK {dek_id}: {error.message}", ""
    try:
        Keystore(handles)
    except EncryptionConflict as error:
        return "", f"the sidecar contradicts itself: {error.message}"
    return "", ""
