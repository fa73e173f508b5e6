"""Auditing calls: wraps the methods that change keys or members, whichever front serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from elastickv.audit import RESULT_OK, AuditLog
from elastickv.server.methods import Services, Unary

Call = Callable[[Any, float], Awaitable[Any]]

AUDITED: Final = {
    "EncryptionAdmin": frozenset({
        "BootstrapEncryption", "RotateDEK", "RegisterEncryptionWriter", "ResyncSidecar",
        "EnableStorageEnvelope", "EnableRaftEnvelope"}),
    "RaftAdmin": frozenset({
        "AddVoter", "AddLearner", "PromoteLearner", "RemoveServer", "TransferLeadership"}),
}
"""Methods by service. ResyncSidecar changes nothing here but hands out every wrapped DEK."""

_KEY_ID_FIELDS: Final = ("dek_id", "new_dek_id", "storage_dek_id", "raft_dek_id")
_INDEX_FIELDS: Final = ("applied_index", "index", "leader_latest_applied_index")
_TARGET_FIELDS: Final = ("id", "target_id", "target_address")


def key_ids_of(*messages: Any) -> list[int]:
    """DEK ids that a request and a response name, ascending, each once."""
    found: set[int] = set()
    for message in messages:
        found.update(getattr(message, name, 0) for name in _KEY_ID_FIELDS)
        found.update(getattr(message, "wrapped_deks_by_id", ()))
    return sorted(found - {0})


def first_of(message: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of the named fields that is set."""
    return next((value for name in names if (value := getattr(message, name, default))), default)


def audited(services: Services, audit: AuditLog) -> Services:
    """The same services, a line written for every call of an audited method."""
    return {service: {
        name: replace(method, call=_audited(method.call, f"{service}/{name}", audit),
                      names_caller=True)
        if isinstance(method, Unary) and name in AUDITED.get(service, ()) else method
        for name, method in methods.items()} for service, methods in services.items()}


def _audited(call: Call, what: str, audit: AuditLog) -> Call:
    async def run(request: Any, timeout_s: float) -> Any:
        response: Any = None
        result = RESULT_OK
        try:
            response = await call(request, timeout_s)
            return response
        except (Exception, asyncio.CancelledError) as error:
            result = type(error).__name__
            raise
        finally:
            audit.record(what=what, target=first_of(request, _TARGET_FIELDS, ""),
                         key_ids=key_ids_of(request, response), result=result,
                         applied_index=first_of(response, _INDEX_FIELDS, 0))

    return run
