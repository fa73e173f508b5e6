"""Who may administer: wraps the methods that change something, whichever front serves them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from elastickv import audit
from elastickv.errors import NotAuthorized
from elastickv.server.audited import AUDITED, READS
from elastickv.server.methods import Services, Unary


def authorized(services: Services, admin_names: Collection[str]) -> Services:
    """The same services; administrative methods but `READS` are refused to callers whose
    certificate has none of `admin_names`. Without names every client may call everything."""
    if not admin_names:
        return services
    names = frozenset(admin_names)
    return {service: {name: _authorized(method, f"{service}/{name}", names)
                      if isinstance(method, Unary) and service in AUDITED and name not in READS
                      else method
                      for name, method in methods.items()}
            for service, methods in services.items()}


def _authorized(method: Unary, name: str, admin_names: frozenset[str]) -> Unary:
    async def call(request: Any, timeout_s: float) -> Any:
        caller = audit.caller.get()
        if caller not in admin_names:
            raise NotAuthorized(
                f"{caller} is no administrator and may not call {name}",
                remedy="call with an administrator's certificate, or add the name to --admin-names"
                       " of every member")
        return await method.call(request, timeout_s)

    return replace(method, call=call, names_caller=True)
