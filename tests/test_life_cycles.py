"""scripts/life_cycles.py: a table becomes a diagram that shows each of its transitions."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elastickv.keys.lifecycle import CUTOVER_TRANSITIONS
from elastickv.kv import rotation, writers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import life_cycles
from life_cycles import Arrow, diagram


class Door(enum.Enum):
    OPEN = "wide open"
    SHUT = "shut"


class Push(enum.Enum):
    PUSH = "push"
    ODD = "push: twice"


@pytest.mark.parametrize(("arrows", "lines"), [
    pytest.param([], ['state "shut" as SHUT', "[*] --> SHUT"], id="nothing happens"),
    pytest.param([Arrow(Door.SHUT, Push.PUSH, Door.OPEN)],
                 ['state "shut" as SHUT', 'state "wide open" as OPEN', "[*] --> SHUT",
                  "SHUT --> OPEN: push"], id="one step"),
    pytest.param([Arrow(Door.SHUT, Push.PUSH, Door.SHUT, "creak")],
                 ['state "shut" as SHUT', "[*] --> SHUT", "SHUT --> SHUT: push / creak"],
                 id="a step to itself, with an action"),
])
def test_diagram(arrows: list[Arrow], lines: list[str]) -> None:
    assert diagram(Door.SHUT, arrows) == "\n".join(
        ["```mermaid", "stateDiagram-v2", *("    " + line for line in lines), "```", ""])


def test_text_that_mermaid_would_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        diagram(Door.SHUT, [Arrow(Door.SHUT, Push.ODD, Door.OPEN)])


CUTOVERS = [(state.name, event.value, after.name)
            for (state, event), (after, _) in CUTOVER_TRANSITIONS.items()]
WRITERS = [(state.name, event.value, after.name)
           for (state, event), after in writers.TRANSITIONS.items()]
ROTATIONS = [(state.name, event.value, after.name)
             for (state, event), after in rotation.TRANSITIONS.items()]


@pytest.mark.parametrize(("draw", "transitions"), [
    pytest.param(life_cycles.cutover_diagram, CUTOVERS, id="cutover"),
    pytest.param(life_cycles.writer_diagram, WRITERS, id="writer"),
    pytest.param(life_cycles.rotation_diagram, ROTATIONS, id="rotation"),
])
def test_every_transition_is_drawn_and_nothing_else(
        draw: Callable[[], str], transitions: list[tuple[str, str, str]]) -> None:
    drawn = [line.strip() for line in draw().splitlines() if "-->" in line and "[*]" not in line]
    assert [line.partition(" / ")[0] for line in drawn] == [
        f"{state} --> {after}: {event}" for state, event, after in transitions]
