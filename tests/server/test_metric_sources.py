"""elastickv.server.metric_sources: what is said of the keys, from the state that apply keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest

from elastickv.crypto.keystore import Purpose
from elastickv.keys.sidecar import Sidecar, SidecarKey
from elastickv.keys.usage import Limits, Usage, encode_usage, usage_key
from elastickv.kv.usage import NonceBudgets
from elastickv.kv.writers import WriterRegistrar
from elastickv.server.metric_sources import encryption_source

OLD, STORAGE, RAFT = 4, 5, 6
WRAPPED = bytes(60)


class Rows:
    """Reservations as the store holds them."""

    def __init__(self) -> None:
        self.by_key = {usage_key(OLD, 1): encode_usage(Usage(0, 1, 999)),
                       usage_key(STORAGE, 1): encode_usage(Usage(10, 3, 20)),
                       usage_key(STORAGE, 2): encode_usage(Usage(0, 1, 5))}

    def row(self, key: bytes) -> bytes | None:
        return self.by_key.get(key)

    def rows(self, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        return [(key, value) for key, value in self.by_key.items() if key.startswith(prefix)]


def key(purpose: Purpose, epoch: int) -> SidecarKey:
    return SidecarKey(purpose, WRAPPED, "2026-01-01T00:00:00Z", epoch)


SIDECAR = Sidecar(raft_applied_index=17, active_storage=STORAGE, active_raft=RAFT,
                  keys=MappingProxyType({OLD: key(Purpose.STORAGE, 9),
                                         STORAGE: key(Purpose.STORAGE, 3),
                                         RAFT: key(Purpose.RAFT, 2)}))


async def refuse(dek_id: int, epoch: int) -> object:
    raise AssertionError("a scrape must not register a writer")


def propose(payload: bytes) -> asyncio.Future[object]:
    raise AssertionError("a scrape must not reserve nonces")


def scraped(sidecar: Sidecar | None, limits: Limits,
            dek_counts: Mapping[int, int]) -> dict[str, float]:
    """One scrape: value by name and labels."""
    writers = WriterRegistrar(1, local_epoch=lambda _: 0, persist=lambda *_: None,
                              register=refuse,  # type: ignore[arg-type]
                              on_confirmed=lambda _: None, on_fatal=lambda _: None)
    budgets = NonceBudgets(Rows(), writers, 1, limits, propose=propose, on_change=lambda: None)
    return {" ".join([sample.name.removeprefix("encryption_"), *sample.labels]): sample.value
            for sample in encryption_source(lambda: sidecar, budgets,
                                            lambda: dek_counts, lambda: 0.25)()}


BEFORE = {"sidecar_index": 0, "cutover_hold_seconds": 0.25, "dek_values 0": 0,
          "active_dek_id storage": 0, "active_dek_id raft": 0}
ACTIVE = {
    "sidecar_index": 17, "cutover_hold_seconds": 0.25, "dek_values 5": 0,
    "active_dek_id storage": STORAGE, "active_dek_id raft": RAFT,
    "dek_writes storage 5": 35, "dek_writes_left storage 5": 65, "dek_epoch storage 5": 3,
    "dek_writes raft 6": 0, "dek_writes_left raft 6": 100, "dek_epoch raft 6": 2}


@pytest.mark.parametrize(("sidecar", "max_writes", "expected"), [
    pytest.param(None, 100, BEFORE, id="no sidecar"),
    pytest.param(Sidecar(raft_applied_index=3), 100, BEFORE | {"sidecar_index": 3},
                 id="not bootstrapped"),
    pytest.param(SIDECAR, 100, ACTIVE, id="replaced DEKs have no series"),
    pytest.param(replace(SIDECAR, active_storage=OLD), 100,
                 {name: value for name, value in ACTIVE.items() if not name.endswith(" 5")}
                 | {"active_dek_id storage": OLD, "dek_writes storage 4": 999,
                    "dek_writes_left storage 4": 0, "dek_epoch storage 4": 9, "dek_values 4": 0},
                 id="past the limit nothing is left"),
])
def test_encryption_source(sidecar: Sidecar | None, max_writes: int,
                           expected: dict[str, float]) -> None:
    assert scraped(sidecar, Limits(max_writes), {}) == expected


def test_every_dek_that_holds_values_has_a_series() -> None:
    found = scraped(SIDECAR, Limits(100), {0: 7, OLD: 2, STORAGE: 1})
    assert {name: value for name, value in found.items() if "values" in name} == {
        "dek_values 0": 7, f"dek_values {OLD}": 2, f"dek_values {STORAGE}": 1}
