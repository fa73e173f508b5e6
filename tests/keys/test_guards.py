"""Every start-up guard: the fact that trips it, and that nothing else does."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from elastickv.crypto.keystore import Purpose
from elastickv.crypto.nonce import full_node_id, node_id16
from elastickv.keys.guards import (
    GUARDS,
    Facts,
    GuardFailed,
    Problem,
    Status,
    require_safe,
    run_guards,
)
from elastickv.keys.provenance import Recorded
from elastickv.keys.registry import WriterRecord, encode_row_value, row_key
from elastickv.keys.sidecar import Sidecar, SidecarKey

NODE = full_node_id("n1")
COLLIDING = NODE ^ (1 << 40)  # other node, same low 16 bits


def sidecar(epoch: int = 3) -> Sidecar:
    return Sidecar(raft_applied_index=50, storage_envelope_active=True,
                   storage_envelope_cutover_index=40, raft_envelope_cutover_index=50,
                   active_storage=1, active_raft=2, keys=MappingProxyType({
                       1: SidecarKey(Purpose.STORAGE, bytes(60), "2026-01-01T00:00:00Z", epoch),
                       2: SidecarKey(Purpose.RAFT, bytes(60), "2026-01-01T00:00:00Z", 3)}))


OTHER_KEYS = MappingProxyType({
    dek_id: replace(key, wrapped=b"\x01" * 60) for dek_id, key in sidecar().keys.items()})
NO_KEYS: MappingProxyType[int, SidecarKey] = MappingProxyType({})
MORE_KEYS = MappingProxyType({**sidecar().keys, 3: sidecar().keys[1]})


def row(dek_id: int, node: int, last_seen: int) -> dict[bytes, bytes]:
    return {row_key(dek_id, node_id16(node)): encode_row_value(WriterRecord(node, 0, last_seen))}


HEALTHY = Facts(full_node_id=NODE, encryption_enabled=True, kek_configured=True, sidecar=sidecar(),
                registry=row(1, NODE, 3), recorded=Recorded(0, 50, 50, sidecar(epoch=1)),
                member_ids={"n1": NODE, "n2": full_node_id("n2")})
FRESH = Facts(full_node_id=NODE, encryption_enabled=False, kek_configured=False)


def recording(**changes: object) -> Facts:
    """`HEALTHY`, whose store says something else."""
    recorded = replace(HEALTHY.recorded, **changes)  # type: ignore[arg-type]
    return replace(HEALTHY, recorded=recorded)


CASES: dict[str, Facts] = {
    "data-directory": replace(HEALTHY, directory_problem=Problem("a node runs on it", "stop it")),
    "file-system": replace(HEALTHY, file_system_problem=Problem("cannot fsync", "move it")),
    "raft-id": replace(HEALTHY, raft_id="n1", directory_owner="n2"),
    "store-readable": replace(HEALTHY, store_problem="a page is damaged"),
    "kek-required": replace(FRESH, encryption_enabled=True),
    "kek-insecure": replace(HEALTHY, kek_problem=Problem("mode 0644", "chmod 600"),
                            kek_insecure=True),
    "kek-readable": replace(HEALTHY, kek_problem=Problem("31 bytes", "give 32")),
    "sidecar-readable": replace(FRESH, sidecar_problem="does not parse"),
    "sidecar-without-flag": replace(HEALTHY, encryption_enabled=False),
    "kek-unwraps": replace(HEALTHY, unwrap_problem="DEK 1 does not unwrap"),
    "epoch-exhausted": replace(HEALTHY, sidecar=sidecar(epoch=0xFFFF)),
    "epoch-rollback": replace(HEALTHY, registry=row(1, NODE, 4)),
    "sidecar-foreign": recording(sidecar=replace(sidecar(), keys=OTHER_KEYS)),
    "sidecar-behind-log": recording(last_encryption_index=51),
    "node-id-collision": replace(HEALTHY, registry=row(1, COLLIDING, 1)),
    "cutover-divergence": recording(raft_cutover_index=49),
}


def test_every_guard_has_a_case() -> None:
    assert list(CASES) == [guard.name for guard in GUARDS]


@pytest.mark.parametrize("facts", [HEALTHY, FRESH], ids=["healthy", "fresh"])
def test_a_sound_node_may_start(facts: Facts) -> None:
    assert not [v for v in run_guards(facts) if v.status is Status.FAIL]
    require_safe(facts)


@pytest.mark.parametrize("name", CASES)
def test_each_guard_refuses_alone_and_names_the_remedy(name: str) -> None:
    failed = [v for v in run_guards(CASES[name]) if v.status is Status.FAIL]
    assert [v.guard for v in failed] == [name]
    assert failed[0].message and failed[0].remedy
    with pytest.raises(GuardFailed, match=name) as caught:
        require_safe(CASES[name])
    assert caught.value.remedy == failed[0].remedy
    assert caught.value.guard == name


def test_every_guard_has_an_error_of_its_own() -> None:
    assert len({guard.error for guard in GUARDS}) == len({guard.name for guard in GUARDS})
    assert len(GUARDS) == len({guard.name for guard in GUARDS})


def test_a_member_with_the_same_16_bit_id_is_a_collision() -> None:
    facts = replace(HEALTHY, member_ids={"n1": NODE, "twin": COLLIDING})
    with pytest.raises(GuardFailed, match="twin"):
        require_safe(facts)


@pytest.mark.parametrize(("ahead", "keys", "foreign"), [
    (-1, MORE_KEYS, True), (0, MORE_KEYS, True), (1, MORE_KEYS, False),
    (-1, NO_KEYS, False), (0, NO_KEYS, True), (1, NO_KEYS, True),
    (-1, OTHER_KEYS, True), (0, OTHER_KEYS, True), (1, OTHER_KEYS, True)])
def test_a_sidecar_is_foreign_when_its_keys_do_not_fit_its_index(
        ahead: int, keys: MappingProxyType[int, SidecarKey], foreign: bool) -> None:
    facts = replace(HEALTHY, sidecar=replace(sidecar(), raft_applied_index=50 + ahead, keys=keys,
                                             active_storage=0, active_raft=0))
    verdicts = {v.guard: v.status for v in run_guards(facts)}
    assert (verdicts["sidecar-foreign"] is Status.FAIL) is foreign


@pytest.mark.parametrize(("rewrapped", "foreign"), [((1, 2), False), ((1,), True), ((), True)])
@pytest.mark.parametrize("ahead", [-1, 0, 1])
def test_another_wrapping_of_the_same_key_is_not_foreign(
        ahead: int, rewrapped: tuple[int, ...], foreign: bool) -> None:
    facts = replace(HEALTHY, sidecar=replace(sidecar(), raft_applied_index=50 + ahead,
                                             keys=OTHER_KEYS), rewrapped=rewrapped)
    verdicts = {v.guard: v.status for v in run_guards(facts)}
    assert (verdicts["sidecar-foreign"] is Status.FAIL) is foreign


BEHIND = replace(sidecar(), raft_applied_index=40, raft_envelope_cutover_index=0)

APPLIED_CASES: dict[str, tuple[Facts, bool]] = {
    "the store's own": (recording(applied_index=90), False),
    "store without keys, sidecar below it": (replace(HEALTHY, recorded=Recorded(90)), True),
    "store without keys, sidecar at its last entry": (
        replace(HEALTHY, recorded=Recorded(50)), True),
    "store without keys, sidecar ahead": (replace(HEALTHY, recorded=Recorded(39)), False),
    "store without keys, sidecar ahead, its cutover below the store": (
        replace(HEALTHY, recorded=Recorded(49)), True),
    "store with older keys, sidecar below it": (
        replace(HEALTHY, recorded=Recorded(90, 40, 0, BEHIND)), True),
    "store with older keys, sidecar ahead": (
        replace(HEALTHY, recorded=Recorded(49, 40, 0, BEHIND)), False),
    "replaying under a sidecar that is ahead": (
        recording(applied_index=45, last_encryption_index=40, raft_cutover_index=0), False),
    "neither log nor store": (
        replace(HEALTHY, recorded=Recorded(), registry={}, has_no_log=True), True),
    "a log that is not applied yet": (replace(HEALTHY, recorded=Recorded(), registry={}), False),
    "a node that never ran": (replace(FRESH, has_no_log=True), False),
}


@pytest.mark.parametrize("name", APPLIED_CASES)
def test_a_sidecar_is_foreign_when_the_store_has_passed_its_index_without_it(name: str) -> None:
    facts, foreign = APPLIED_CASES[name]
    assert [v.guard for v in run_guards(facts) if v.status is Status.FAIL] == \
        ["sidecar-foreign"] * foreign


@pytest.mark.parametrize(("storage_cutover", "words"), [
    (0, "move it away"), (49, "move it away"), (30, "join it anew")])
def test_a_node_that_may_have_refused_writes_joins_anew(storage_cutover: int, words: str) -> None:
    """Moving the sidecar away would not bring them back."""
    foreign = replace(sidecar(), storage_envelope_active=storage_cutover > 0, keys=MORE_KEYS,
                      storage_envelope_cutover_index=storage_cutover)
    with pytest.raises(GuardFailed, match="sidecar-foreign") as caught:
        require_safe(replace(recording(applied_index=49), sidecar=foreign))
    assert words in caught.value.remedy.split(":")[0]


def test_a_cutover_of_the_storage_that_differs() -> None:
    with pytest.raises(GuardFailed, match=r"cutover-divergence.*storage cutover"):
        require_safe(recording(sidecar=replace(sidecar(), storage_envelope_cutover_index=41)))


def test_a_lost_sidecar_is_behind_the_log() -> None:
    with pytest.raises(GuardFailed, match="sidecar-behind-log"):
        require_safe(replace(HEALTHY, sidecar=None))


@pytest.mark.parametrize(("kek", "enabled", "beginning"), [
    (True, True, "start the node: it takes the leader's"),
    (False, False, "start with --kekFile and --encryption-enabled: the node takes the leader's"),
    (True, False, "start with --kekFile and --encryption-enabled: the node takes the leader's"),
], ids=["with encryption", "without encryption", "with the KEK alone"])
@pytest.mark.parametrize("problem", ["", "does not parse"], ids=["lost", "damaged"])
def test_a_sidecar_comes_back_at_a_start_with_encryption(problem: str, kek: bool, enabled: bool,
                                                         beginning: str) -> None:
    facts = replace(HEALTHY, sidecar=None, sidecar_problem=problem, kek_configured=kek,
                    encryption_enabled=enabled)
    with pytest.raises(GuardFailed) as caught:
        require_safe(facts)
    assert caught.value.remedy.startswith(beginning)


def test_a_sidecar_that_is_one_entry_ahead_is_left_to_replay() -> None:
    require_safe(recording(last_encryption_index=40, raft_cutover_index=0))


def test_guards_that_do_not_apply_say_so() -> None:
    statuses = {v.guard: v.status for v in run_guards(FRESH)}
    assert statuses["kek-unwraps"] is Status.NOT_APPLICABLE
    assert statuses["kek-readable"] is Status.NOT_APPLICABLE
