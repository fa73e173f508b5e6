"""Gathers the facts that the start-up guards judge. Reads only, apart from the file-system
probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastickv import contacts
from elastickv.config import NodeSettings
from elastickv.crypto.kek import Kek
from elastickv.crypto.kek_file import FileKekProvider
from elastickv.crypto.nonce import full_node_id
from elastickv.durable import Disk, probe_file_system
from elastickv.errors import ElasticKVError, KekTooOpen
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.guards import FILE_SYSTEM_REMEDY, Facts, FileSystemUnsafe
from elastickv.keys.registry import WRITERS_PREFIX
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar
from elastickv.kv.fsm import META_LAST_ENCRYPTION_INDEX, META_RAFT_CUTOVER_INDEX
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc_store import Store, decode_number

AUDIT_WHOLE = 1 << 62
"""A store of any size is audited before anything else is said about it."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """The facts, and the KEK where it could be loaded."""

    facts: Facts
    kek: Kek | None


def examine(settings: NodeSettings, disk: Disk) -> Facts:
    """The facts of a node that does not run, for `elastickv doctor`. The caller holds the data
    directory's lock, if there is one."""
    members = {contact.node_id: full_node_id(contact.node_id)
               for contact in contacts.load(disk, settings.raft_data_dir)}
    members |= {member.node_id: full_node_id(member.node_id)
                for member in settings.founding_members or settings.raft_join}
    directory = settings.raft_data_dir / "store"
    if not disk.exists(directory):
        return gather(settings, disk, None, members).facts
    try:
        backend = LmdbBackend(directory, inline_audit_bytes=AUDIT_WHOLE)
        store = Store.open(backend)
    except ElasticKVError as error:
        return gather(settings, disk, None, members, store_problem=error.message).facts
    try:
        return gather(settings, disk, store, members).facts
    finally:
        store.close()


def require_file_system(settings: NodeSettings, disk: Disk) -> None:
    """The first guard on its own, before anything is opened that could fail on the same cause.

    Raises `FileSystemUnsafe`.
    """
    problem, remedy = _probe(settings, disk)
    if problem:
        raise FileSystemUnsafe(problem, remedy=remedy or FILE_SYSTEM_REMEDY)


def gather(settings: NodeSettings, disk: Disk, store: Store | None,
           member_ids: Mapping[str, int], *, store_problem: str = "") -> Gathered:
    """Everything that `keys.guards` wants to know.

    `store` None = the node never ran, or its store cannot be opened: `store_problem` says why.
    """
    file_system_problem, file_system_remedy = _probe(settings, disk)
    kek, kek_error = _load_kek(settings)
    sidecar, sidecar_problem = _load_sidecar(settings, disk)
    return Gathered(Facts(
        full_node_id=full_node_id(settings.raft_id),
        encryption_enabled=settings.encryption_enabled,
        kek_configured=settings.kek_file is not None,
        file_system_problem=file_system_problem,
        file_system_remedy=file_system_remedy,
        store_problem=store_problem,
        kek_problem=kek_error.message if kek_error else "",
        kek_remedy=kek_error.remedy if kek_error else "",
        kek_insecure=isinstance(kek_error, KekTooOpen),
        sidecar=sidecar,
        sidecar_problem=sidecar_problem,
        unwrap_problem=_unwrap_problem(kek, sidecar),
        registry=dict(store.rows(WRITERS_PREFIX)) if store else {},
        last_encryption_index=decode_number(store.meta(META_LAST_ENCRYPTION_INDEX)) if store else 0,
        store_cutover_index=decode_number(store.meta(META_RAFT_CUTOVER_INDEX)) if store else 0,
        member_ids=member_ids), kek)


def _probe(settings: NodeSettings, disk: Disk) -> tuple[str, str]:
    """What is wrong with the file system, and the remedy; "" and "" when nothing is."""
    # What does not exist yet will be made in the nearest directory that does.
    directory = settings.raft_data_dir.absolute()
    existing = next(path for path in (directory, *directory.parents) if disk.exists(path))
    try:
        probe_file_system(disk, existing)
    except ElasticKVError as error:
        return error.message, error.remedy
    return "", ""


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


def _unwrap_problem(kek: Kek | None, sidecar: Sidecar | None) -> str:
    if kek is None:
        return "no KEK is loaded" if sidecar is not None else ""
    for dek_id, key in (sidecar.keys if sidecar else {}).items():
        try:
            kek.unwrap_handle(key.wrapped, dek_id, key.purpose)
        except ElasticKVError as error:
            return f"DEK {dek_id}: {error.message}"
    return ""
