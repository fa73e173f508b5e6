"""Counting calls: wraps a table of methods, so that a node without metrics pays nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from elastickv.metrics import Recorder
from elastickv.server.errors import status_of
from elastickv.server.methods import Services, Unary

Call = Callable[[Any, float], Awaitable[Any]]


def measured(services: Services, recorder: Recorder) -> Services:
    """The same services, their unary methods recorded. Streams last as long as their caller likes
    and are left alone."""
    return {service: {name: replace(method, call=_measured(method.call, f"{service}/{name}",
                                                           recorder))
                      if isinstance(method, Unary) else method
                      for name, method in methods.items()}
            for service, methods in services.items()}


def _measured(call: Call, name: str, recorder: Recorder) -> Call:
    async def run(request: Any, timeout_s: float) -> Any:
        began = time.perf_counter()
        status = "OK"
        try:
            return await call(request, timeout_s)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except Exception as error:
            status = status_of(error).code.name
            raise
        finally:
            recorder.count("grpc_calls_total", name, status)
            recorder.observe("grpc_call_seconds", time.perf_counter() - began, name)

    return run
