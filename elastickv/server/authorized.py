"""Who may administer: wraps the methods that change something, whichever front serves them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

from elastickv import audit
from elastickv.errors import NotAuthorized
from elastickv.server.methods import ADMINISTRATIVE, READS, Services, Unary, wrapped


def authorized(services: Services, admin_names: Collection[str]) -> Services:
    """The same services; administrative methods but `READS` are refused to callers whose
    certificate has none of `admin_names`. Without names every client may call everything."""
    if not admin_names:
        return services
    return wrapped(services, partial(_authorized, frozenset(admin_names)))


def _authorized(admin_names: frozenset[str], service: str, name: str, method: Unary) -> Unary:
    if service not in ADMINISTRATIVE or name in READS:
        return method

    async def call(request: Any, timeout_s: float) -> Any:
        caller = audit.caller.get()
        if caller not in admin_names:
            raise NotAuthorized(
                f"{caller} is no administrator and may not call {service}/{name}",
                remedy="call with an administrator's certificate, or add the name to --admin-names"
                       " of every member")
        return await method.call(request, timeout_s)

    return replace(method, call=call, names_caller=True)
