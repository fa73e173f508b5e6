"""RawKV and TransactionalKV over `kv.api.KvApi`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from elastickv.errors import InvalidArgument, Unimplemented
from elastickv.kv.api import Condition, KvApi, Op, OpKind, Pair
from elastickv.kv.turns import Turns
from elastickv.kv.txn import MAX_BATCH_OPS, check_batch_count
from elastickv.pb import service_pb2 as pb
from elastickv.server.methods import AS_FRONT, Methods, Unary, unary

MAX_SCAN_LIMIT = 100_000
_OP_KINDS = {pb.RawBatchOp.PUT: OpKind.PUT, pb.RawBatchOp.DELETE: OpKind.DELETE}

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""
COUNTED_BYTES = 256 << 10
"""Smaller batches are parsed uncounted, as counting takes time too: they hold 131,072 operations at
most, which take 10 MiB and some milliseconds."""


def check_scan_limit(limit: int) -> int:
    """Raise `InvalidArgument` unless 1 <= limit <= 100,000. A larger one is refused, not cut: a
    caller would take a short answer for the end of the range."""
    if not 1 <= limit <= MAX_SCAN_LIMIT:
        raise InvalidArgument(f"limit is {limit}; it must be 1 to {MAX_SCAN_LIMIT}",
                              remedy="scan in pages, each starting after the last key")
    return limit


def add_pairs(add: Callable[..., object], pairs: Sequence[Pair]) -> None:
    """Put the pairs into a response whose repeated field has this `add`: a list of messages, given
    to the response, would be copied."""
    for key, value in pairs:
        add(key=key, value=value)


def op_of(message: pb.RawBatchOp) -> Op:
    """One operation. Raises `InvalidArgument` for an unknown kind or a delete with a value."""
    kind = _OP_KINDS.get(message.kind)
    if kind is None:
        raise InvalidArgument(f"batch operation kind {message.kind} is unknown",
                              remedy="use PUT (0) or DELETE (1)")
    if kind is OpKind.DELETE and (message.value or message.ttl_ms):
        raise InvalidArgument("a delete carries a value or a ttl_ms", remedy="leave both empty")
    return Op(kind, message.key, message.value, message.ttl_ms)


def field_count(content: bytes, most: int) -> int:
    """How many fields a message has, counted up to `most`; where the bytes are no message, those
    before that place. The fields of a group count as well."""
    position = count = 0
    try:
        while position < len(content) and count < most:
            tag, position = _varint(content, position)
            count += 1
            kind = tag & 7
            if kind == _LENGTH:
                size, position = _varint(content, position)
                position += size
            elif kind == _VARINT:
                _, position = _varint(content, position)
            elif kind in (_FIXED64, _FIXED32):
                position += 8 if kind == _FIXED64 else 4
    except IndexError:
        pass  # it ends too early
    return count


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and where it ends. Raises `IndexError`."""
    value = content[position]
    position += 1
    if value < 0x80:
        return value, position
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError


def parse_batch(content: bytes) -> pb.RawBatchRequest:
    """A batch whose operations were counted before it was parsed: two bytes on the wire become a
    message that is forty times as large. Raises `InvalidArgument`, `DecodeError`."""
    if len(content) > COUNTED_BYTES and field_count(content, MAX_BATCH_OPS + 1) > MAX_BATCH_OPS:
        raise InvalidArgument(f"a batch has more operations and conditions than {MAX_BATCH_OPS},"
                              " the limit", remedy="split the batch")
    return pb.RawBatchRequest.FromString(content)


class RawKv:
    """The RawKV service. A scan's response holds at most `max_result_bytes`."""

    def __init__(self, kv: KvApi, *, max_result_bytes: int) -> None:
        self._kv = kv
        self._max_result_bytes = max_result_bytes
        self._turns = Turns()

    def methods(self) -> Methods:
        """Methods by name."""
        return {
            "RawPut": unary(self.put, pb.RawPutRequest, pb.RawPutResponse,
                            max_message_bytes=AS_FRONT),
            "RawGet": unary(self.get, pb.RawGetRequest, pb.RawGetResponse),
            "RawDelete": unary(self.delete, pb.RawDeleteRequest, pb.RawDeleteResponse),
            "RawLatestCommitTS": unary(self.latest_commit_ts, pb.RawLatestCommitTSRequest,
                                       pb.RawLatestCommitTSResponse),
            "RawScanAt": unary(self.scan_at, pb.RawScanAtRequest, pb.RawScanAtResponse),
            "RawBatch": Unary(self.batch, parse_batch, pb.RawBatchResponse.SerializeToString,
                              max_message_bytes=AS_FRONT, turns=self._turns),
        }

    async def put(self, request: pb.RawPutRequest, timeout_s: float) -> pb.RawPutResponse:
        index, commit_ts = await self._kv.put(request.key, request.value, ttl_ms=request.ttl_ms,
                                              timeout_s=timeout_s)
        return pb.RawPutResponse(commit_index=index, success=True, commit_ts=commit_ts)

    async def get(self, request: pb.RawGetRequest, timeout_s: float) -> pb.RawGetResponse:
        result = await self._kv.get(request.key, ts=request.ts, stale=request.stale,
                                    timeout_s=timeout_s)
        return pb.RawGetResponse(read_at_index=result.read_at_index, value=result.value,
                                 exists=result.exists, commit_ts=result.commit_ts,
                                 stale_ms=result.stale_ms, ttl_ms=result.ttl_ms)

    async def delete(self, request: pb.RawDeleteRequest,
                     timeout_s: float) -> pb.RawDeleteResponse:
        index, commit_ts = await self._kv.delete(request.key, timeout_s=timeout_s)
        return pb.RawDeleteResponse(commit_index=index, success=True, commit_ts=commit_ts)

    async def latest_commit_ts(self, request: pb.RawLatestCommitTSRequest,
                               timeout_s: float) -> pb.RawLatestCommitTSResponse:
        commit_ts, exists = await self._kv.latest_commit_ts(request.key, timeout_s=timeout_s)
        return pb.RawLatestCommitTSResponse(ts=commit_ts, exists=exists)

    async def scan_at(self, request: pb.RawScanAtRequest,
                      timeout_s: float) -> pb.RawScanAtResponse:
        found = await self._kv.scan(
            request.start_key, request.end_key, limit=check_scan_limit(request.limit),
            max_bytes=self._max_result_bytes, ts=request.ts, reverse=request.reverse,
            keys_only=request.keys_only, stale=request.stale, timeout_s=timeout_s)
        response = pb.RawScanAtResponse(stale_ms=found.stale_ms)
        add_pairs(response.kv.add, found.pairs)
        return response

    async def batch(self, request: pb.RawBatchRequest, timeout_s: float) -> pb.RawBatchResponse:
        # Before anything is made of them: `parse_batch` lets small messages pass.
        check_batch_count(len(request.ops) + len(request.conditions))
        result = await self._kv.batch(
            [op_of(op) for op in request.ops],
            conditions=[Condition(c.key, c.commit_ts) for c in request.conditions],
            timeout_s=timeout_s)
        return pb.RawBatchResponse(commit_index=result.commit_index, commit_ts=result.commit_ts)


class TransactionalKv:
    """The TransactionalKV service: single-operation transactions."""

    def __init__(self, kv: KvApi, *, max_result_bytes: int) -> None:
        self._kv = kv
        self._max_result_bytes = max_result_bytes

    def methods(self) -> Methods:
        """Methods by name."""
        return {
            "Put": unary(self.put, pb.PutRequest, pb.PutResponse, max_message_bytes=AS_FRONT),
            "Get": unary(self.get, pb.GetRequest, pb.GetResponse),
            "Delete": unary(self.delete, pb.DeleteRequest, pb.DeleteResponse),
            "Scan": unary(self.scan, pb.ScanRequest, pb.ScanResponse),
            # Not parsed either: a megabyte may hold half a million parts.
            "PreWrite": Unary(self.not_served, bytes, pb.PreCommitResponse.SerializeToString),
            "Commit": Unary(self.not_served, bytes, pb.CommitResponse.SerializeToString),
            "Rollback": Unary(self.not_served, bytes, pb.RollbackResponse.SerializeToString),
        }

    async def put(self, request: pb.PutRequest, timeout_s: float) -> pb.PutResponse:
        index, _ = await self._kv.put(request.key, request.value, timeout_s=timeout_s)
        return pb.PutResponse(commit_index=index, success=True)

    async def get(self, request: pb.GetRequest, timeout_s: float) -> pb.GetResponse:
        result = await self._kv.get(request.key, timeout_s=timeout_s)
        return pb.GetResponse(read_at_index=result.read_at_index, value=result.value)

    async def delete(self, request: pb.DeleteRequest, timeout_s: float) -> pb.DeleteResponse:
        index, _ = await self._kv.delete(request.key, timeout_s=timeout_s)
        return pb.DeleteResponse(commit_index=index, success=True)

    async def scan(self, request: pb.ScanRequest, timeout_s: float) -> pb.ScanResponse:
        found = await self._kv.scan(request.start_key, request.end_key,
                                    limit=check_scan_limit(request.limit),
                                    max_bytes=self._max_result_bytes, timeout_s=timeout_s)
        response = pb.ScanResponse()
        add_pairs(response.kv.add, found.pairs)
        return response

    async def not_served(self, request: bytes, timeout_s: float) -> NoReturn:
        raise Unimplemented("multi-request transactions are not served by this version",
                            remedy="use RawBatch with conditions for an atomic read-modify-write")
