"""elastickv.kv.member_rules: what one member's report says beside the leader's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastickv.kv.api import Capability, MemberReport, SidecarState
from elastickv.kv.member_rules import problems

WRAPPED = {1: b"one", 2: b"two", 3: b"three"}
LEADER = MemberReport(Capability(0x11, True, "build", True, 1), SidecarState(
    WRAPPED, 3, 2, True, 30, 99, {}, 20, 40))


def test_a_member_that_says_what_the_leader_does_has_no_problem() -> None:
    assert problems(LEADER, LEADER) == []


@pytest.mark.parametrize(("changes", "words"), [
    ({"wrapped_deks_by_id": {1: b"two", 2: b"one", 3: b"three"}}, "holds other keys"),
    ({"wrapped_deks_by_id": {1: b"one", 2: b"two"}}, "holds other keys"),
    ({"active_storage_id": 1}, "holds other keys"),
    ({"active_raft_id": 1}, "holds other keys"),
    ({"storage_envelope_active": False}, "holds other keys"),
    ({"storage_envelope_cutover_index": 21}, "holds other keys"),
    ({"raft_envelope_cutover_index": 31}, "holds other keys"),
    ({"sidecar_index": 39, "active_storage_id": 1}, "up to entry 39"),
], ids=["two keys changed places", "a key is missing", "another is active for values",
        "another is active for the log", "values are not sealed", "another storage cutover",
        "another raft cutover", "it is behind"])
def test_keys_that_are_not_the_leaders(changes: dict[str, object], words: str) -> None:
    member = replace(LEADER, sidecar=replace(LEADER.sidecar, **changes))  # type: ignore[arg-type]
    (line,) = problems(member, LEADER)
    assert words in line


def test_a_member_that_is_ahead_of_the_leader_is_not_compared() -> None:
    ahead = replace(LEADER.sidecar, sidecar_index=41, active_storage_id=1)
    assert problems(replace(LEADER, sidecar=ahead), LEADER) == []
