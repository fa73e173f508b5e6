"""The engine's document names tests and modules that exist, and every hazard scenario is in it."""

from __future__ import annotations

import re
from pathlib import Path

from test_hazards import HAZARDS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = (ROOT / "docs" / "internals" / "engine.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8")
                  for area in ("raft", "sim")
                  for path in (ROOT / "tests" / area).glob("test_*.py"))


def invariants() -> list[list[str]]:
    section = DOCUMENT.split("## Invariants")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_every_test_in_the_table_exists():
    rows = invariants()
    assert len(rows) > 30
    for row in rows:
        names = re.findall(r"`(\w+)`", row[2])
        assert names, row
        for name in names:
            assert f"def {name}(" in TESTS, name


def test_every_module_in_the_table_exists():
    for _, kept, _ in invariants():
        for module in re.findall(r"`(\w+)[.\w]*`", kept):
            assert (ROOT / "elastickv" / "raft" / f"{module}.py").exists() \
                or module in ("leader_fallback_s", "setCurrentTerm", "_synced", "_fail"), module


def test_every_scenario_is_in_the_table():
    table = "\n".join(row[2] for row in invariants())
    assert [case.name for case in HAZARDS if f"`{case.name}`" not in table] == []
