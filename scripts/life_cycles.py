"""The page docs/concepts/life-cycles.md, drawn from the tables that the code executes.

`diagram` turns a transition table into a mermaid state diagram, so that a picture cannot show a
step that the code does not take.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

from elastickv.keys.lifecycle import CUTOVER_TRANSITIONS, CutoverState
from elastickv.kv import rotation, writers


class Arrow(NamedTuple):
    """One transition. `action` is what is done besides, "" for nothing."""

    state: enum.Enum
    event: enum.Enum
    after: enum.Enum
    action: str = ""


def diagram(first: enum.Enum, arrows: Iterable[Arrow]) -> str:
    """A mermaid stateDiagram-v2 that starts in `first`, one line per transition, in order.

    Names and values of the enums become ids and texts; a colon would end a text early, so one in
    an event or action is an error (`ValueError`).
    """
    drawn = list(arrows)
    states = dict.fromkeys([first, *(state for arrow in drawn
                                     for state in (arrow.state, arrow.after))])
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{state.value}" as {state.name}' for state in states]
    lines.append(f"    [*] --> {first.name}")
    for arrow in drawn:
        text = f"{arrow.event.value} / {arrow.action}" if arrow.action else str(arrow.event.value)
        if ":" in text or ";" in text:
            raise ValueError(f"mermaid cannot show {text!r}")
        lines.append(f"    {arrow.state.name} --> {arrow.after.name}: {text}")
    return "```mermaid\n" + "\n".join(lines) + "\n```\n"


def cutover_diagram() -> str:
    """A cutover as entries meet it, with what the applier does."""
    return diagram(CutoverState.BEFORE, (
        Arrow(state, event, after, action.value)
        for (state, event), (after, action) in CUTOVER_TRANSITIONS.items()))


def writer_diagram() -> str:
    """The registration of one process as a writer of one DEK."""
    return diagram(writers.WriterState.UNCONFIRMED, (
        Arrow(state, event, after) for (state, event), after in writers.TRANSITIONS.items()))


def rotation_diagram() -> str:
    """The leader's automatic rotation for one purpose."""
    return diagram(rotation.RotationState.IDLE, (
        Arrow(state, event, after) for (state, event), after in rotation.TRANSITIONS.items()))


def page() -> str:
    """The text below the page's note."""
    return (
        "\n# Life cycles\n\nThese diagrams are drawn from the transition tables that the code "
        "executes.\n"
        "\n## A DEK and its writers\n\nA DEK exists from the bootstrap or rotation that brings "
        "it. It is active, meaning that new ciphertext uses it, until a rotation brings its "
        "successor; afterwards it stays and opens what was written under it. Before a node "
        "makes its first nonce under a DEK it becomes a confirmed writer. This is the state of "
        "one process under one DEK; a restart begins at the top, with a higher epoch.\n\n"
        + writer_diagram()
        + "\n*Stale*: the registry has seen that epoch or a higher one. *Doubtful*: no answer, so "
          "the epoch is abandoned. *Refused*: the leader certainly registered nothing, so the same "
          "epoch is asked for again. Only a confirmed process makes nonces. A rotation carries its "
          "proposer's registration, which therefore begins at *proposed*.\n"
          "\n## An automatic rotation\n\nOn every node, for each purpose; only a leader gets "
          "past the first state. *Due* means too many writes, too old, or nearly out of epochs.\n\n"
        + rotation_diagram()
        + "\n## A cutover\n\nThe same for values and for log entries, on every replica when it "
          "applies a cutover entry. Nothing leads back. An entry that names another DEK was "
          "overtaken by a rotation and does nothing.\n\n"
        + cutover_diagram())
