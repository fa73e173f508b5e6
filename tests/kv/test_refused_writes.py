"""Writes that were certainly not proposed: they wait for a better time, and never spin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from elastickv.clock import FakeClock, HybridLogicalClock
from elastickv.errors import ElasticKVError, NoLeader, NotLeader, Unreachable
from elastickv.kv.api import WriteResult
from elastickv.kv.coordinator import Coordinator
from elastickv.kv.proposer import Proposer
from elastickv.raft.engine import Role
from elastickv.store.values import plain_record
from elastickv.wire import Entry, Writes, decode_entry

LOOP_PASSES = 200


class RefusingEngine:
    """An engine that refuses every proposal and every call until `error` is None."""

    node_id = "n1"

    def __init__(self, *, leads: bool, error: ElasticKVError) -> None:
        self.leads = leads
        self.error: ElasticKVError | None = error
        self.attempts = 0

    def handle(self, method: str, handler: Callable[..., Any], *,
               members_only: bool = False) -> None:
        """Nobody calls this node."""

    def on_role_change(self, callback: Callable[[Role, int], None]) -> None:
        """The role stays."""

    def shed_clear_entries(self, index: int) -> None:
        """There is no log."""

    def is_leader(self) -> bool:
        return self.leads

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(leader_id="n2")

    def propose(self, payload: bytes, *, timeout_s: float) -> asyncio.Future[object]:
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        entry = decode_entry(payload)
        if not isinstance(entry, Writes):
            future.set_result(1)
            return future
        self.attempts += 1
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result([WriteResult(7, r.commit_ts) for r in entry.requests])
        return future

    async def call(self, node_id: str, method: str, payload: bytes, *, timeout_s: float) -> bytes:
        self.attempts += 1
        if self.error is not None:
            raise self.error
        raise AssertionError("not reached in these tests")


class ClearSeals:
    """Entries go into the log as they are."""

    def entry_ready(self, *, beyond_limit: bool = False) -> bool:
        return True

    def seal_entry(self, payload: bytes, *, beyond_limit: bool = False,
                   entry: Entry | None = None) -> bytes | None:
        return payload


def coordinator(engine: Any) -> Coordinator:
    return Coordinator(
        engine, HybridLogicalClock(FakeClock()), Proposer(engine, ClearSeals()),
        sealer=lambda count: lambda key, ts, value, expiry: plain_record(value, expiry),
        writable=lambda: None, max_value_bytes=100, max_request_bytes=1000)


@pytest.mark.parametrize(("leads", "error"), [
    (True, NoLeader("the leadership is being handed over")),
    (True, NotLeader()),
    (False, Unreachable("no link")),
    (False, NoLeader("no leader")),
], ids=["refusing leader", "deposed leader", "no link", "leader without leadership"])
async def test_a_refused_write_waits_instead_of_spinning(leads: bool,
                                                         error: ElasticKVError) -> None:
    engine = RefusingEngine(leads=leads, error=error)
    write = asyncio.ensure_future(coordinator(engine).put(b"k", b"v", timeout_s=60.0))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(LOOP_PASSES):
        await asyncio.sleep(0)
    waited_s = loop.time() - begun
    # One attempt at once, then one per pause: never one per pass of the loop.
    assert 1 <= engine.attempts <= 2 + waited_s / 0.02
    write.cancel()


async def test_a_refused_write_is_proposed_again() -> None:
    engine = RefusingEngine(leads=True, error=NoLeader("the leadership is being handed over"))
    write = asyncio.ensure_future(coordinator(engine).put(b"k", b"v", timeout_s=60.0))
    while engine.attempts == 0:
        await asyncio.sleep(0)
    engine.error = None
    assert (await write).commit_index == 7


async def test_a_refused_write_fails_as_not_written_at_its_deadline() -> None:
    engine = RefusingEngine(leads=False, error=Unreachable("no link"))
    with pytest.raises(NoLeader, match="nothing was written"):
        await coordinator(engine).put(b"k", b"v", timeout_s=0.1)
