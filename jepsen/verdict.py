"""What a checker says: valid, invalid, or unknown, and why.

Unknown is a result of its own: a checker that ran out of time, or had nothing to look at, has shown
nothing, so unknown never counts as a pass.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


class Validity(enum.StrEnum):
    """The three possible answers."""

    VALID = "valid"
    INVALID = "invalid"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of one checker.

    `problems` are sentences, one per violation (or per reason for not knowing), each complete
    enough to find the operations in the history. `facts` are counters that show what was looked at.
    """

    checker: str
    validity: Validity
    problems: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        return self.validity is Validity.VALID

    def as_dict(self) -> dict[str, object]:
        """The JSON form in `results.json`."""
        return {"checker": self.checker, "verdict": self.validity.value,
                "problems": list(self.problems), "facts": dict(self.facts)}


def judge(checker: str, problems: Iterable[str], facts: Mapping[str, object],
          unknown: Iterable[str] = ()) -> Verdict:
    """Invalid with any problem, else unknown with any reason for it, else valid."""
    found, doubts = tuple(problems), tuple(unknown)
    if found:
        return Verdict(checker, Validity.INVALID, found, facts)
    if doubts:
        return Verdict(checker, Validity.UNKNOWN, doubts, facts)
    return Verdict(checker, Validity.VALID, (), facts)


def combine(verdicts: Iterable[Verdict]) -> Validity:
    """One invalid makes the whole invalid; without one, one unknown makes it unknown.

    No verdict at all is unknown: nothing was checked.
    """
    validities = {verdict.validity for verdict in verdicts}
    if Validity.INVALID in validities:
        return Validity.INVALID
    if not validities or Validity.UNKNOWN in validities:
        return Validity.UNKNOWN
    return Validity.VALID
