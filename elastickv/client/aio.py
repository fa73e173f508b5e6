"""The asyncio client: key-value calls, and the encryption and Raft operations under attributes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from elastickv.client import convert, rpcs
from elastickv.client.caller import Caller
from elastickv.client.model import (
    BootstrapResult,
    Capability,
    Condition,
    CutoverResult,
    Delete,
    MemberEncryption,
    Pair,
    Purpose,
    Put,
    RaftMember,
    RaftStatus,
    ReadResult,
    RotateResult,
    SidecarState,
    Writer,
    WriteResult,
)
from elastickv.config import TlsFiles
from elastickv.errors import ResultTooLarge
from elastickv.pb import encryption_admin_pb2 as admin_pb
from elastickv.pb import service_pb2 as pb

DEFAULT_TIMEOUT_S = 5.0
SCAN_PAGE = 1000


class Client:
    """Reads and writes one cluster. Use it as `async with Client([...]) as client:`.

    `endpoints` are `host:port` of any members; `tls` None means plain text. Every call takes
    `timeout_s`, which bounds the call with its retries (where nobody can be reached it takes up to
    0.2 seconds more to learn why), and raises `elastickv.errors` only:

    * reads are retried on other members; writes only where they certainly did not happen;
    * `OutcomeUnknown`: the write may have happened; read before you decide to write again;
    * `Unreachable`, `NoLeader`, `DeadlineExceeded`: certainly nothing happened within the time.

    Belongs to the event loop in which it was created. `encryption` and `raft` operate the cluster.
    """

    def __init__(self, endpoints: Sequence[str], *, tls: TlsFiles | None = None,
                 timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Raises `ConfigError` for an address that is none and for unusable TLS files."""
        self._caller = Caller(endpoints, tls, timeout_s)
        self.encryption = EncryptionCalls(self._caller)
        self.raft = RaftCalls(self._caller)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End what is under way, with an error, and disconnect. Idempotent."""
        await self._caller.close()

    async def put(self, key: bytes, value: bytes, *, ttl_ms: int = 0,
                  timeout_s: float | None = None) -> WriteResult:
        """Write one key. `ttl_ms` 0 = never expires."""
        response = await self._caller.call(
            rpcs.RAW_PUT, lambda: pb.RawPutRequest(key=key, value=value, ttl_ms=ttl_ms), timeout_s)
        return WriteResult(response.commit_index, response.commit_ts)

    async def get(self, key: bytes, *, ts: int = 0, stale: bool = False,
                  timeout_s: float | None = None) -> ReadResult:
        """The version visible at `ts` (0 = latest). Linearizable unless `stale`."""
        response = await self._caller.call(
            rpcs.RAW_GET, lambda: pb.RawGetRequest(key=key, ts=ts, stale=stale), timeout_s)
        return ReadResult(response.value, response.exists, response.commit_ts,
                          response.read_at_index, response.stale_ms, response.ttl_ms)

    async def delete(self, key: bytes, *, timeout_s: float | None = None) -> WriteResult:
        """Remove one key. Removing an absent key is a write like any other."""
        response = await self._caller.call(
            rpcs.RAW_DELETE, lambda: pb.RawDeleteRequest(key=key), timeout_s)
        return WriteResult(response.commit_index, response.commit_ts)

    async def batch(self, ops: Iterable[Put | Delete], *, conditions: Iterable[Condition] = (),
                    timeout_s: float | None = None) -> WriteResult:
        """All of `ops` at one timestamp, or nothing. Of two on one key the last wins.

        Raises `ConditionFailed` when a condition does not hold.
        """
        # Taken first: an error of the caller's own iterables is none of an argument.
        all_ops, all_conditions = list(ops), list(conditions)
        response = await self._caller.call(
            rpcs.RAW_BATCH, lambda: convert.batch_request(all_ops, all_conditions), timeout_s)
        return WriteResult(response.commit_index, response.commit_ts)

    async def latest_commit_ts(self, key: bytes, *,
                               timeout_s: float | None = None) -> tuple[int, bool]:
        """`(commit_ts, exists)` of the latest version; deleted and expired keys do not exist."""
        response = await self._caller.call(
            rpcs.RAW_LATEST, lambda: pb.RawLatestCommitTSRequest(key=key), timeout_s)
        return response.ts, response.exists

    async def scan(self, start: bytes = b"", end: bytes = b"", *, limit: int = SCAN_PAGE,
                   ts: int = 0, reverse: bool = False, keys_only: bool = False,
                   stale: bool = False, on_stale_ms: Callable[[int], object] | None = None,
                   timeout_s: float | None = None) -> list[Pair]:
        """Up to `limit` pairs with start <= key < end (b"" = unbounded), in (reverse) key order.
        Linearizable unless `stale`, which a member answers without the others; how old its answer
        may be, as in `ReadResult`, goes to `on_stale_ms`.
        """
        response = await self._caller.call(
            rpcs.RAW_SCAN, lambda: pb.RawScanAtRequest(
                start_key=start, end_key=end, limit=limit, ts=ts, reverse=reverse,
                keys_only=keys_only, stale=stale), timeout_s)
        if on_stale_ms is not None:
            on_stale_ms(response.stale_ms)
        return [Pair(pair.key, pair.value) for pair in response.kv]

    async def scan_pages(self, start: bytes = b"", end: bytes = b"", *, page: int = SCAN_PAGE,
                         ts: int = 0, reverse: bool = False, keys_only: bool = False,
                         stale: bool = False,
                         on_stale_ms: Callable[[int], object] | None = None,
                         timeout_s: float | None = None) -> AsyncIterator[list[Pair]]:
        """The whole range, up to `page` pairs at a time. `timeout_s` bounds each page, and
        `on_stale_ms` gets the age of each, also of one that is empty.

        Without `ts` each page shows the moment at which it is read; with `ts` all show that one.
        """
        while True:
            try:
                pairs = await self.scan(start, end, limit=page, ts=ts, reverse=reverse,
                                        keys_only=keys_only, stale=stale,
                                        on_stale_ms=on_stale_ms, timeout_s=timeout_s)
            except ResultTooLarge:
                if page == 1:
                    raise
                page //= 2
                continue
            if pairs:
                yield pairs
            if len(pairs) < page:
                return
            if reverse:
                end = pairs[-1].key
            else:
                start = pairs[-1].key + b"\0"


class EncryptionCalls:
    """Operating encryption: `client.encryption`. No key material in the clear passes here.

    Mutating calls raise `GateOff` where encryption is switched off, `EncryptionConflict` where they
    contradict the committed state, and are retried only where nothing was proposed.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def capability(self, *, timeout_s: float | None = None) -> Capability:
        """What the member that answers says of itself."""
        return convert.capability(
            await self._caller.call(rpcs.CAPABILITY, admin_pb.Empty, timeout_s))

    async def sidecar_state(self, *, timeout_s: float | None = None) -> SidecarState:
        """The sidecar of the member that answers."""
        return convert.sidecar(await self._caller.call(rpcs.SIDECAR, admin_pb.Empty, timeout_s))

    async def members(self, *, timeout_s: float | None = None) -> list[MemberEncryption]:
        """Every member's capability and sidecar, reachable or not."""
        report = await self._caller.call(rpcs.MEMBERS, admin_pb.Empty, timeout_s)
        return [convert.member(status) for status in report.members]

    async def bootstrap(self, *, wrapped_storage: bytes = b"", wrapped_raft: bytes = b"",
                        storage_dek_id: int = 0, raft_dek_id: int = 0,
                        writers: Sequence[Writer] = (),
                        timeout_s: float | None = None) -> BootstrapResult:
        """Give the cluster its first DEKs. With everything left empty the leader makes them."""
        response = await self._caller.call(
            rpcs.BOOTSTRAP, lambda: admin_pb.BootstrapEncryptionRequest(
                wrapped_storage_dek=wrapped_storage, wrapped_raft_dek=wrapped_raft,
                storage_dek_id=storage_dek_id, raft_dek_id=raft_dek_id,
                writer_batch=convert.writer_entries(writers)), timeout_s)
        return BootstrapResult(response.applied_index, response.storage_dek_id,
                               response.raft_dek_id)

    async def rotate_dek(self, purpose: Purpose, *, wrapped: bytes = b"", new_dek_id: int = 0,
                         proposer_node_id: int = 0, proposer_local_epoch: int = 0,
                         timeout_s: float | None = None) -> RotateResult:
        """Make a new DEK active. With everything left empty the leader makes it."""
        response = await self._caller.call(rpcs.ROTATE, lambda: admin_pb.RotateDEKRequest(
            purpose=admin_pb.RotateDEKRequest.Purpose.ValueType(int(purpose)),
            wrapped_new_dek=wrapped, new_dek_id=new_dek_id, proposer_node_id=proposer_node_id,
            proposer_local_epoch=proposer_local_epoch), timeout_s)
        return RotateResult(response.applied_index, response.new_dek_id)

    async def register_writers(self, dek_id: int, writers: Sequence[Writer], *,
                               timeout_s: float | None = None) -> int:
        """Enter writers of a DEK into the registry; the log index."""
        response = await self._caller.call(
            rpcs.REGISTER, lambda: admin_pb.RegisterEncryptionWriterRequest(
                dek_id=dek_id, writers=convert.writer_entries(writers)), timeout_s)
        return response.applied_index

    async def resync_sidecar(self, caller_full_node_id: int, *,
                             timeout_s: float | None = None) -> SidecarState:
        """The leader's keys, and the epochs that the registry holds for that node."""
        return convert.resync(await self._caller.call(
            rpcs.RESYNC, lambda: admin_pb.ResyncSidecarRequest(
                caller_full_node_id=caller_full_node_id), timeout_s))

    async def enable_storage_envelope(self, *, proposer_node_id: int = 0,
                                      proposer_local_epoch: int = 0,
                                      timeout_s: float | None = None) -> CutoverResult:
        """From now on values are ciphertext. One-way; repeating it reports the first time."""
        response = await self._caller.call(
            rpcs.ENABLE_STORAGE, lambda: admin_pb.EnableStorageEnvelopeRequest(
                proposer_node_id=proposer_node_id,
                proposer_local_epoch=proposer_local_epoch), timeout_s)
        return convert.cutover(response)

    async def enable_raft_envelope(self, *, proposer_node_id: int = 0,
                                   proposer_local_epoch: int = 0,
                                   timeout_s: float | None = None) -> CutoverResult:
        """From now on the log is ciphertext. One-way; repeating it reports the first time."""
        response = await self._caller.call(
            rpcs.ENABLE_RAFT, lambda: admin_pb.EnableRaftEnvelopeRequest(
                proposer_node_id=proposer_node_id,
                proposer_local_epoch=proposer_local_epoch), timeout_s)
        return convert.cutover(response)


class RaftCalls:
    """Operating the Raft group: `client.raft`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def status(self, *, timeout_s: float | None = None) -> RaftStatus:
        """The counters of the member that answers."""
        return convert.raft_status(
            await self._caller.call(rpcs.RAFT_STATUS, pb.RaftAdminStatusRequest, timeout_s))

    async def members(self, *, timeout_s: float | None = None) -> list[RaftMember]:
        """The current configuration."""
        response = await self._caller.call(
            rpcs.RAFT_CONFIGURATION, pb.RaftAdminConfigurationRequest, timeout_s)
        return [convert.raft_member(member) for member in response.servers]

    async def add_voter(self, node_id: str, address: str, *, previous_index: int = 0,
                        timeout_s: float | None = None) -> int:
        """Add a voting member at its raft `address`; the new configuration's index.

        `previous_index` other than 0 must be the present configuration's index.
        """
        response = await self._caller.call(rpcs.ADD_VOTER, lambda: pb.RaftAdminAddVoterRequest(
            id=node_id, address=address, previous_index=previous_index), timeout_s)
        return response.index

    async def add_learner(self, node_id: str, address: str, *, previous_index: int = 0,
                          timeout_s: float | None = None) -> int:
        """Add a member that receives the log and does not vote."""
        response = await self._caller.call(rpcs.ADD_LEARNER, lambda: pb.RaftAdminAddLearnerRequest(
            id=node_id, address=address, previous_index=previous_index), timeout_s)
        return response.index

    async def promote_learner(self, node_id: str, *, previous_index: int = 0,
                              min_applied_index: int = 0, skip_min_applied_check: bool = False,
                              timeout_s: float | None = None) -> int:
        """Let a learner vote once it has applied `min_applied_index`."""
        response = await self._caller.call(rpcs.PROMOTE, lambda: pb.RaftAdminPromoteLearnerRequest(
            id=node_id, previous_index=previous_index, min_applied_index=min_applied_index,
            skip_min_applied_check=skip_min_applied_check), timeout_s)
        return response.index

    async def remove_server(self, node_id: str, *, previous_index: int = 0,
                            timeout_s: float | None = None) -> int:
        """Remove a member, which then stops itself."""
        response = await self._caller.call(rpcs.REMOVE, lambda: pb.RaftAdminRemoveServerRequest(
            id=node_id, previous_index=previous_index), timeout_s)
        return response.index

    async def transfer_leadership(self, node_id: str = "", *,
                                  timeout_s: float | None = None) -> None:
        """Hand leadership to a member ("" = the most up-to-date voter)."""
        await self._caller.call(rpcs.TRANSFER, lambda: pb.RaftAdminTransferLeadershipRequest(
            target_id=node_id), timeout_s)
