"""The harness against the real node, in short: 40 seconds of mixed faults, and planted bugs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jepsen.cli import INTERRUPTED

ROOT = Path(__file__).parents[2]
PLANTED_NODE = Path(__file__).with_name("planted_node.py")
FAULTS = "wipe,pause,partition-halves,isolate-leader,one-way,slow,rotate-storage,rotate-raft"


def run_jepsen(directory: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """One run; its exit code, what it printed, and its results."""
    process = subprocess.run(
        [sys.executable, "-m", "jepsen", "run", "--out", str(directory), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=280, check=False)
    results = directory / "results.json"
    assert results.exists(), process.stdout + process.stderr
    return process.returncode, process.stdout, json.loads(results.read_text())


def problems(results: dict[str, Any], checker: str) -> list[str]:
    return [problem for found in results["checkers"]
            if found["checker"] == checker and found["verdict"] == "invalid"
            for problem in found["problems"]]


@pytest.mark.cluster
@pytest.mark.slow
def test_forty_seconds_of_faults_are_survived(tmp_path: Path) -> None:
    code, output, results = run_jepsen(
        tmp_path / "run", "--workload", "all", "--faults", FAULTS, "--time", "40",
        "--rate", "120", "--concurrency", "3", "--seed", "1")
    assert code == 0, output
    assert output.splitlines()[-1].endswith("verdict: valid")
    assert set(results["faults"]) == set(FAULTS.split(","))
    assert results["operations"]["ok"] > 500
    verdicts = {found["checker"]: found["verdict"] for found in results["checkers"]}
    [processes] = [found for found in results["checkers"] if found["checker"] == "processes"]
    assert sum(processes["facts"]["snapshots_installed"].values()) > 0
    assert verdicts == dict.fromkeys(
        ("recovery", "linearizable", "append", "bank", "unique-writes", "scans", "errors", "load",
         "faults", "processes", "logs", "replicas", "versions", "compaction", "nonces",
         "plaintext", "keys"), "valid")
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "seed 1" in output
    assert results["settings"]["launcher"][-2:] == ["-m", "elastickv"]


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(("bug", "checker", "message"), [
    ("stale-reads", "linearizable", "not linearizable"),
    ("lost-acks", "linearizable", "not linearizable"),
    ("nonce-reuse", "nonces", "used twice"),
    ("plaintext-leak", "plaintext", "spill.tmp"),
    ("scratch-leak", "plaintext", "spill.tmp of n"),
    ("key-leak", "keys", ".cache: DEK "),
])
def test_a_planted_bug_is_found(tmp_path: Path, bug: str, checker: str, message: str) -> None:
    code, output, results = run_jepsen(
        tmp_path / "run", "--workload", "register", "--faults", "isolate-leader", "--time", "8",
        "--rate", "400", "--seed", "1", "--launcher", str(PLANTED_NODE),
        "--environment", f"ELASTICKV_PLANTED_BUG={bug}")
    assert code == 1
    assert output.splitlines()[-1].endswith("verdict: invalid")
    assert any(message in problem for problem in problems(results, checker)), output


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_that_is_interrupted_twice_ends_as_after_one_time(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with subprocess.Popen(
            [sys.executable, "-m", "jepsen", "run", "--out", str(directory), "--faults", "none",
             "--network", "proxy", "--time", "60"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert any("nodes are up" in line for line in process.stdout)
            process.terminate()
            assert any("interrupted" in line for line in process.stderr)
            process.terminate()
            assert process.wait(60) == INTERRUPTED
        finally:
            process.kill()
    assert not (directory / "results.json").exists()
    running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_about(path, directory)]
    assert running == []


def is_about(command_line: Path, directory: Path) -> bool:
    """Whether a process, which may be over by now, has something of `directory` as an argument."""
    try:
        return str(directory).encode() in command_line.read_bytes()
    except OSError:
        return False


def test_the_planted_node_is_in_no_wheel() -> None:
    assert PLANTED_NODE.is_relative_to(ROOT / "tests")
    source = [path for path in (ROOT / "elastickv").rglob("*.py")
              if "PLANTED" in path.read_text(encoding="utf-8")]
    assert source == []
