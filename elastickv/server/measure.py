"""Counting calls: wraps a table of methods, so that a node without metrics pays nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import Any

from elastickv.metrics import Recorder
from elastickv.server.errors import status_of
from elastickv.server.methods import Services, Unary, wrapped


def measured(services: Services, recorder: Recorder) -> Services:
    """The same services, their unary methods recorded."""
    return wrapped(services, partial(_measured, recorder))


def _measured(recorder: Recorder, service: str, name: str, method: Unary) -> Unary:
    call, label = method.call, f"{service}/{name}"

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
            recorder.count("grpc_calls_total", label, status)
            recorder.observe("grpc_call_seconds", time.perf_counter() - began, label)

    return replace(method, call=run)
