"""Auditing calls: wraps the methods of the administrative services, whichever front serves them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any, Final

from google.protobuf.message import DecodeError

from elastickv.audit import RESULT_OK, AuditLog
from elastickv.errors import InvalidArgument
from elastickv.server.methods import ADMINISTRATIVE, READS, Services, Unary, wrapped

_KEY_ID_FIELDS: Final = ("dek_id", "new_dek_id", "storage_dek_id", "raft_dek_id")
_INDEX_FIELDS: Final = ("applied_index", "index")
_TARGET_FIELDS: Final = ("id", "target_id", "target_address")


def key_ids_of(*messages: Any) -> list[int]:
    """DEK ids that a request and a response name, ascending, each once."""
    found: set[int] = set()
    for message in messages:
        found.update(getattr(message, field, 0) for field in _KEY_ID_FIELDS)
        found.update(getattr(message, "wrapped_deks_by_id", ()))
        for member in getattr(message, "members", ()):
            found.update(member.sidecar.wrapped_deks_by_id)
    return sorted(found - {0})


def first_of(message: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of the named fields that is set."""
    return next((value for name in names if (value := getattr(message, name, default))), default)


def audited(services: Services, audit: AuditLog) -> Services:
    """The same services, a line written for every call of an administrative method."""
    return wrapped(services, partial(_audited, audit))


def _audited(audit: AuditLog, service: str, name: str, method: Unary) -> Unary:
    if service not in ADMINISTRATIVE:
        return method
    what = f"{service}/{name}"
    index_fields = () if name in READS else _INDEX_FIELDS

    async def call(request: Any, timeout_s: float) -> Any:
        response: Any = None
        result = RESULT_OK
        try:
            response = await method.call(request, timeout_s)
            return response
        except (Exception, asyncio.CancelledError) as error:
            result = type(error).__name__
            raise
        finally:
            audit.record(what=what, target=first_of(request, _TARGET_FIELDS, ""),
                         key_ids=key_ids_of(request, response), result=result,
                         applied_index=first_of(response, index_fields, 0))

    def parse(content: bytes) -> Any:
        try:
            return method.parse(content)
        except DecodeError:
            audit.record(what=what, target="", key_ids=[], result=InvalidArgument.__name__,
                         applied_index=0)
            raise

    return replace(method, call=call, parse=parse, names_caller=True)
