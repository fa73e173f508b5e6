"""What `elastickv local-cluster` asks of its nodes, each one by its own address.

A client of the whole cluster picks a member by itself; here there is one client per member, because
the point is to see each of them ready.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from elastickv.client import SyncClient
from elastickv.client.pool import OPTIONS, credentials_of
from elastickv.config import TlsFiles
from elastickv.errors import EncryptionConflict, Unreachable

HEALTH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class NodeView:
    """One member's own account of itself: a row of the status table."""

    member: str
    address: str
    role: str
    term: int
    applied_index: int
    storage_dek_id: int
    raft_dek_id: int
    storage_cutover_index: int
    raft_cutover_index: int


class ClusterApi:
    """Calls to the members of a local cluster.

    What is not so yet raises a `PeerError`: every step may be tried again.
    """

    def __init__(self, members: Sequence[tuple[str, str]], tls: TlsFiles) -> None:
        """`members` are (id, address) pairs."""
        self._tls = tls
        self._names = {address: node_id for node_id, address in members}
        self._open = contextlib.ExitStack()
        self._clients = {address: self._open.enter_context(SyncClient([address], tls=tls))
                         for _, address in members}
        # Successive attempts ask different members: one that hangs must not block them all.
        self._next = itertools.cycle(self._clients.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._open.close()

    def require_ready(self, address: str) -> None:
        """Raises `Unreachable` unless the member's health is SERVING and it knows a leader."""
        with grpc.secure_channel(address, credentials_of(self._tls), OPTIONS) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_S)
            except grpc.RpcError as error:
                raise Unreachable(f"{error.code().name}: {error.details()}") from None
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unreachable("it does not serve yet")
        if not self._clients[address].raft.status().leader_id:
            raise Unreachable("no leader has been elected")

    def bootstrap(self) -> None:
        """Bootstrap encryption unless that was done before."""
        encryption = next(self._next).encryption
        if encryption.sidecar_state().active_storage_id == 0:
            # The member that was asked may not have applied a bootstrap that is committed.
            with contextlib.suppress(EncryptionConflict):
                encryption.bootstrap()

    def enable_storage_envelope(self) -> int:
        """The storage cutover, done now or before; its log index."""
        return next(self._next).encryption.enable_storage_envelope().applied_index

    def enable_raft_envelope(self) -> int:
        """The raft cutover, done now or before; its log index."""
        return next(self._next).encryption.enable_raft_envelope().applied_index

    def view(self, address: str, storage_index: int, raft_index: int) -> NodeView:
        """A member's state; raises `Unreachable` until it has applied both cutovers."""
        client = self._clients[address]
        status, sidecar = client.raft.status(), client.encryption.sidecar_state()
        if sidecar.raft_envelope_cutover_index != raft_index or not sidecar.storage_envelope_active:
            raise Unreachable(f"it has applied index {status.applied_index} only")
        return NodeView(
            member=self._names[address], address=address, role=status.role.name.lower(),
            term=status.term, applied_index=status.applied_index,
            storage_dek_id=sidecar.active_storage_id, raft_dek_id=sidecar.active_raft_id,
            storage_cutover_index=storage_index, raft_cutover_index=raft_index)
