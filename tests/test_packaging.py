"""A wheel built from a clean checkout holds the generated stubs, types and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copy(ROOT / name, checkout)
    for name in ("elastickv", "proto", "scripts"):
        shutil.copytree(ROOT / name, checkout / name,
                        ignore=shutil.ignore_patterns("__pycache__", "pb"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", str(checkout / "dist"), str(checkout)],
        check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next((checkout / "dist").glob("*.whl")))


def test_stubs_and_types_are_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for proto in ("service", "encryption_admin"):
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            assert f"elastickv/pb/{proto}{suffix}" in names
    assert "elastickv/py.typed" in names


def test_every_module_is_inside_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "elastickv").rglob("*.py")}
    packaged = {name for name in wheel.namelist() if name.endswith(".py")}
    assert packaged == modules


def test_the_command_is_declared(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "elastickv = elastickv.cli.main:main" in wheel.read(entry).decode()


def test_lock_files_pin_everything_with_hashes() -> None:
    for name in ("requirements.lock", "requirements-build.lock", "requirements-dev.lock"):
        lines = (ROOT / name).read_text().splitlines()
        pins = [number for number, line in enumerate(lines) if "==" in line]
        assert pins
        for number in pins:
            assert lines[number].endswith("\\")
            assert lines[number + 1].strip().startswith("--hash=sha256:")
        assert not [line for line in lines if "://" in line or line.startswith("-")]
