"""Finds the vector files: `*vectors.json`, `*keys.json` and `*traces.json` (or `.json.gz`) in the
folder that the environment variable ELASTICKV_VECTORS names, `tests/vectors/data` by default."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

DEFAULT_FOLDER = Path(__file__).parent / "data"
KINDS = ("vectors", "keys", "traces")


def folder() -> Path:
    return Path(os.environ.get("ELASTICKV_VECTORS") or DEFAULT_FOLDER)


def find(kind: str, where: Path | None = None) -> list[Path]:
    """Files of one kind, by name."""
    where = where or folder()
    return sorted({*where.glob(f"*{kind}.json"), *where.glob(f"*{kind}.json.gz")})


def read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def read(path: Path) -> dict[str, Any]:
    document = json.loads(read_bytes(path))
    if not isinstance(document, dict):
        raise TypeError(f"{path} holds no JSON object")
    return document


def keks(where: Path | None = None) -> list[bytes]:
    """The KEKs that the folder's vectors name, each once."""
    found: dict[bytes, None] = {}
    for path in find("vectors", where):
        for case in read(path).get("kek_file_wrap") or ():
            found[bytes.fromhex(case["kek"])] = None
    return list(found)
