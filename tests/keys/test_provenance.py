"""Which sidecars cannot be of a log, by what a store or a snapshot of it has recorded."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import pytest

from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Purpose
from elastickv.keys.provenance import Recorded, contradiction, may_have_refused, rewrapped
from elastickv.keys.sidecar import Sidecar, SidecarKey

KEYS = MappingProxyType({1: SidecarKey(Purpose.STORAGE, bytes(60), "", 3),
                         2: SidecarKey(Purpose.RAFT, bytes(60), "", 3)})
OTHER_KEYS = MappingProxyType({dek_id: replace(key, wrapped=b"\x01" * 60)
                               for dek_id, key in KEYS.items()})
MORE_KEYS = MappingProxyType({**KEYS, 3: KEYS[1]})
OTHER_PURPOSE = MappingProxyType({**KEYS, 1: replace(KEYS[1], purpose=Purpose.RAFT)})


def after(index: int, *, storage: int = 0, raft: int = 0,
          keys: MappingProxyType[int, SidecarKey] = KEYS) -> Sidecar:
    """The sidecar after the key entry `index`, with the cutovers that were until then."""
    return Sidecar(index, storage != 0, storage, raft, 1, 2, keys)


def version_1(index: int) -> Sidecar:
    """With the storage cutover behind it, at an index that it does not tell."""
    return replace(after(index), storage_envelope_active=True)


class Case(NamedTuple):
    """The store or snapshot is at `applied`, its last key entry left `stored`."""

    sidecar: Sidecar
    applied: int
    stored: Sidecar | None
    words: str = ""
    last: int | None = None
    raft: int | None = None
    rewrapped: tuple[int, ...] = ()

    @property
    def recorded(self) -> Recorded:
        stored = self.stored or Sidecar()
        return Recorded(
            self.applied, stored.raft_applied_index if self.last is None else self.last,
            stored.raft_envelope_cutover_index if self.raft is None else self.raft, self.stored)


PASSED = "no encryption entry after"
STORAGE = "storage cutover"
RAFT = "raft cutover"
DEK = "disagree on DEK"

CASES: dict[str, Case] = {
    "the store's own": Case(after(8, storage=4, raft=8), 9, after(8, storage=4, raft=8)),
    "an old copy": Case(after(4, storage=4), 9, after(8, storage=4, raft=8)),
    "ahead of an empty store": Case(after(8, storage=4, raft=8), 0, None),
    "ahead, the cutovers still to be applied": Case(after(8, storage=4, raft=8), 3, after(2)),
    "ahead, one cutover applied": Case(after(8, storage=4, raft=8), 7, after(4, storage=4)),
    "ahead, both cutovers applied": Case(after(20, storage=4, raft=8), 9,
                                         after(8, storage=4, raft=8)),
    "replaying under a sidecar that is ahead": Case(
        after(8, storage=4, raft=8), 5, after(8, storage=4, raft=8), last=4, raft=0),

    "passed, no key entry in the log": Case(after(2), 9, None, PASSED),
    "passed at the very index": Case(after(9), 9, None, PASSED),
    "passed, earlier key entries in the log": Case(after(4), 9, after(2), PASSED),

    "ahead, a storage cutover that is in no log": Case(after(20, storage=2), 5, None, STORAGE),
    "ahead, a storage cutover at the last entry": Case(after(20, storage=5), 5, None, STORAGE),
    "ahead, a storage cutover elsewhere": Case(after(20, storage=4), 9, after(5, storage=5),
                                               STORAGE),
    "ahead, a raft cutover that is in no log": Case(after(20, raft=2), 5, None, RAFT),
    "ahead, a raft cutover elsewhere": Case(after(20, raft=4), 9, after(5, raft=5), RAFT),
    "a raft cutover beyond itself and the log": Case(after(3, raft=8), 5, after(3), RAFT),
    "a storage cutover beyond itself and the log": Case(after(3, storage=8), 5, after(3), STORAGE),
    "ahead, without the log's storage cutover": Case(after(20), 9, after(5, storage=5), STORAGE),
    "ahead, without the log's raft cutover": Case(after(20), 9, after(5, raft=5), RAFT),
    "as far, another cutover at the same index": Case(after(4, storage=4), 9, after(4, raft=4),
                                                      RAFT),

    "as far, other keys": Case(after(8, keys=OTHER_KEYS), 9, after(8), DEK),
    "as far, more keys": Case(after(8, keys=MORE_KEYS), 9, after(8), DEK),
    "as far, fewer keys": Case(after(8), 9, after(8, keys=MORE_KEYS), DEK),
    "ahead, more keys": Case(after(10, keys=MORE_KEYS), 9, after(8)),
    "ahead, fewer keys": Case(after(10), 9, after(8, keys=MORE_KEYS), DEK),
    "ahead, other keys": Case(after(10, keys=OTHER_KEYS), 9, after(8), DEK),
    "behind, fewer keys": Case(after(6), 9, after(8, keys=MORE_KEYS)),
    "behind, more keys": Case(after(6, keys=MORE_KEYS), 9, after(8), DEK),
    "as far, a key of another purpose": Case(after(8, keys=OTHER_PURPOSE), 9, after(8), DEK),
    "ahead, a key of another purpose": Case(after(10, keys=OTHER_PURPOSE), 9, after(8)),
    "behind, a key of another purpose": Case(after(6, keys=OTHER_PURPOSE), 9, after(8)),
    "other wrappings of the same keys": Case(after(10, keys=OTHER_KEYS), 9, after(8),
                                             rewrapped=(1, 2)),
    "another wrapping of one key": Case(after(10, keys=OTHER_KEYS), 9, after(8), DEK,
                                        rewrapped=(1,)),

    "a store without a copy, ahead": Case(after(20, storage=4, raft=5), 9, None, last=5, raft=5),
    "a store without a copy, another raft cutover": Case(after(20, raft=4), 9, None, RAFT, last=5,
                                                         raft=5),
    "version 1": Case(version_1(8), 9, version_1(8)),
    "version 1, ahead": Case(version_1(20), 9, version_1(8)),
    "version 1, the store's copy newer": Case(version_1(8), 9, after(8, storage=4)),
    "the store's copy of version 1": Case(after(8, storage=4), 9, version_1(8)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_a_log_says_of_a_sidecar(case: Case) -> None:
    found = contradiction(case.sidecar, case.recorded, case.rewrapped)
    assert (found is not None) is bool(case.words)
    if found is not None:
        assert case.words in found.message
        assert found.of_cutover is (case.words in (STORAGE, RAFT))


REFUSING: dict[str, tuple[Case, bool]] = {
    "no storage cutover": (Case(after(20), 9, None), False),
    "a storage cutover still to come": (Case(after(20, storage=9), 9, None), False),
    "the log's storage cutover": (Case(after(20, storage=4), 9, after(8, storage=4)), False),
    "a storage cutover that is in no log": (Case(after(20, storage=4), 9, None), True),
    "a storage cutover elsewhere": (Case(after(20, storage=4), 9, after(8, storage=5)), True),
    "before the log's": (Case(after(20, storage=4), 9, after(8)), True),
    "version 1 in a log without one": (Case(version_1(20), 9, after(8)), True),
    "version 1 in its own log": (Case(version_1(20), 9, version_1(8)), False),
}


@pytest.mark.parametrize(("case", "expected"), REFUSING.values(), ids=REFUSING)
def test_which_sidecars_may_have_made_a_node_refuse_what_others_applied(
        case: Case, expected: bool) -> None:
    assert may_have_refused(case.sidecar, case.recorded) is expected


def test_other_wrappings_of_a_key_are_told_from_another_key() -> None:
    kek, foreign = Kek(bytes(32)), Kek(b"\x01" * 32)
    plain = {dek_id: kek.generate_wrapped_dek() for dek_id in (1, 2, 3, 4)}
    again = {1: plain[1], 2: kek.wrap(kek.unwrap(plain[2])), 3: kek.generate_wrapped_dek(),
             4: foreign.wrap(kek.unwrap(plain[4]))}
    one, other = (after(8, keys=MappingProxyType(
        {dek_id: SidecarKey(Purpose.STORAGE, wrapped, "") for dek_id, wrapped in of.items()}))
        for of in (plain, again))
    assert rewrapped(kek, one, other) == {2}
    for_the_log = replace(other, keys=MappingProxyType(
        {dek_id: replace(key, purpose=Purpose.RAFT) for dek_id, key in other.keys.items()}))
    assert rewrapped(kek, one, for_the_log) == {2}
    assert rewrapped(None, one, other) == rewrapped(kek, one, None) == set()
