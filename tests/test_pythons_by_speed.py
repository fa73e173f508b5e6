"""scripts/pythons_by_speed.sh: every Python of a known version once, the fastest first."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fake_python(directory: Path, answer: str, name: str = "python3.11") -> str:
    directory.mkdir()
    path = directory / name
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


def found(*directories: str) -> list[str]:
    """The paths of the fakes, in the order of the script."""
    path = ":".join([*directories, "/usr/bin", "/bin"])
    done = subprocess.run([str(ROOT / "scripts/pythons_by_speed.sh")], env={"PATH": path},
                          capture_output=True, text=True, check=True)
    paths = [line.split(" ", 2)[2] for line in done.stdout.splitlines()]
    return [each for each in paths if str(Path(each).parent) in directories]


def test_the_fastest_comes_first(tmp_path: Path) -> None:
    slow = fake_python(tmp_path / "slow", "echo 2000000 3.11.9")
    fast = fake_python(tmp_path / "fast", "echo 1000000 3.11.2")
    assert found(str(tmp_path / "slow"), str(tmp_path / "fast")) == [fast, slow]


def test_another_minor_version_counts_as_well(tmp_path: Path) -> None:
    old = fake_python(tmp_path / "old", "echo 2000000 3.11.9")
    new = fake_python(tmp_path / "new", "echo 1000000 3.13.1", "python3.13")
    assert found(str(tmp_path / "old"), str(tmp_path / "new")) == [new, old]


def test_equals_keep_the_order_of_path(tmp_path: Path) -> None:
    first = fake_python(tmp_path / "first", "echo 1000000 3.11.9")
    second = fake_python(tmp_path / "second", "echo 950000 3.11.2")
    assert found(str(tmp_path / "first"), str(tmp_path / "second")) == [first, second]


def test_another_version_and_a_broken_one_are_left_out(tmp_path: Path) -> None:
    fake_python(tmp_path / "other", "exit 1")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "python3.11").symlink_to(tmp_path / "nothing")
    good = fake_python(tmp_path / "good", "echo 1000000 3.11.9")
    assert found(*(str(tmp_path / name) for name in ("other", "gone", "good"))) == [good]


def test_a_talkative_one_and_a_dead_link_do_not_hide_the_rest(tmp_path: Path) -> None:
    fake_python(tmp_path / "talkative", "echo welcome back")
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "python3.11").symlink_to(tmp_path / "no" / "such" / "place")
    good = fake_python(tmp_path / "a good one", "echo 1000000 3.11.9")
    assert found(*(str(tmp_path / name) for name in ("talkative", "dead", "a good one"))) == [good]


def test_two_names_of_one_interpreter_count_once(tmp_path: Path) -> None:
    path = fake_python(tmp_path / "bin", "echo 1000000 3.11.9")
    (tmp_path / "bin" / "python3").symlink_to(path)
    assert found(str(tmp_path / "bin")) == [path]


def test_this_interpreter_is_measured() -> None:
    done = subprocess.run([sys.executable, "-I", str(ROOT / "scripts/measure_python.py")],
                          capture_output=True, text=True, check=True)
    nanoseconds, version = done.stdout.split()
    assert int(nanoseconds) > 0
    assert version == sys.version.split()[0]
