"""What `elastickv local-cluster` asks of its nodes, each one by address.

The client library picks a member by itself; here every member is asked in turn, because the point
is to see each of them ready.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from elastickv.config import TlsFiles
from elastickv.errors import Unreachable
from elastickv.pb import (
    encryption_admin_pb2,
    encryption_admin_pb2_grpc,
    service_pb2,
    service_pb2_grpc,
)

CALL_TIMEOUT_S = 5.0


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
    """Calls to the members of a local cluster; every failure is `Unreachable`: try again."""

    def __init__(self, members: Sequence[tuple[str, str]], tls: TlsFiles) -> None:
        """`members` are (id, address) pairs."""
        credentials = grpc.ssl_channel_credentials(
            tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes())
        # Reconnect at once: the nodes are being started while we try.
        options = [("grpc.initial_reconnect_backoff_ms", 100),
                   ("grpc.max_reconnect_backoff_ms", 200)]
        self._names = {address: node_id for node_id, address in members}
        self._channels = {address: grpc.secure_channel(address, credentials, options)
                          for _, address in members}
        self._next = itertools.cycle(self._channels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for channel in self._channels.values():
            channel.close()

    def require_ready(self, address: str) -> None:
        """Raises `Unreachable` unless the member serves and knows a leader."""
        health = health_pb2_grpc.HealthStub(self._channels[address])
        answer = _call(health.Check, health_pb2.HealthCheckRequest())
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unreachable("it does not serve yet")
        if not self._status(address).leader_id:
            raise Unreachable("no leader has been elected")

    def bootstrap(self) -> None:
        """Bootstrap encryption unless that was done before."""
        address = next(self._next)
        if self._sidecar(address).active_storage_id == 0:
            _call(self._encryption(address).BootstrapEncryption,
                  encryption_admin_pb2.BootstrapEncryptionRequest())

    def enable_storage_envelope(self) -> int:
        """The storage cutover, done now or before; its log index."""
        answer = _call(self._encryption(next(self._next)).EnableStorageEnvelope,
                       encryption_admin_pb2.EnableStorageEnvelopeRequest())
        return int(answer.applied_index)

    def enable_raft_envelope(self) -> int:
        """The raft cutover, done now or before; its log index."""
        answer = _call(self._encryption(next(self._next)).EnableRaftEnvelope,
                       encryption_admin_pb2.EnableRaftEnvelopeRequest())
        return int(answer.applied_index)

    def view(self, address: str, storage_index: int, raft_index: int) -> NodeView:
        """A member's state; raises `Unreachable` until it has applied both cutovers."""
        status, sidecar = self._status(address), self._sidecar(address)
        if sidecar.raft_envelope_cutover_index != raft_index or not sidecar.storage_envelope_active:
            raise Unreachable(f"it has applied index {status.applied_index} only")
        role = service_pb2.RaftAdminState.Name(status.state).removeprefix("RAFT_ADMIN_STATE_")
        return NodeView(
            member=self._names[address], address=address, role=role.lower(), term=status.term,
            applied_index=status.applied_index, storage_dek_id=sidecar.active_storage_id,
            raft_dek_id=sidecar.active_raft_id, storage_cutover_index=storage_index,
            raft_cutover_index=raft_index)

    def _encryption(self, address: str) -> encryption_admin_pb2_grpc.EncryptionAdminStub:
        return encryption_admin_pb2_grpc.EncryptionAdminStub(self._channels[address])

    def _status(self, address: str) -> service_pb2.RaftAdminStatusResponse:
        stub = service_pb2_grpc.RaftAdminStub(self._channels[address])
        answer: service_pb2.RaftAdminStatusResponse = _call(
            stub.Status, service_pb2.RaftAdminStatusRequest())
        return answer

    def _sidecar(self, address: str) -> encryption_admin_pb2.SidecarStateReport:
        answer: encryption_admin_pb2.SidecarStateReport = _call(
            self._encryption(address).GetSidecarState, encryption_admin_pb2.Empty())
        return answer


def _call(method: Callable[..., Any], request: object) -> Any:
    try:
        return method(request, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        raise Unreachable(f"{error.code().name}: {error.details()}") from None
