"""Imports point downward only: one table of layers, checked against every import in the package.

Imports inside functions and under TYPE_CHECKING count like any other: a layer that must not know
another must not know its types either.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "elastickv"

LAYERS: dict[str, int] = {
    "errors": 0, "clock": 0, "config": 0, "durable": 0, "metrics": 0, "logs": 0, "certs": 0,
    "audit": 0, "hygiene": 0, "tls": 0, "descriptors": 0, "listening": 0,
    "wire": 1, "crypto": 1,
    "keys": 2, "store": 2, "raft": 2,
    "kv": 3,
    "server": 5, "startup": 5, "contacts": 5, "data_directory": 5,
    "resync": 6, "node": 6, "client": 6, "cli": 6, "__main__": 6,
}
# Generated from proto/ and below everything, but the gRPC wire ends at the servers and the clients.
GENERATED = "pb"
MAY_IMPORT_GENERATED = {"server", "node", "client", "cli"}

# Who may import what from outside: the seams that keep a library replaceable.
ONLY_IMPORTERS: dict[str, tuple[str, ...]] = {
    "pysyncobj": ("raft/pysyncobj_",),
    "lmdb": ("store/",),
    "grpc": ("server/", "client", "cli/", "node.py"),
    "click": ("cli/",),
    "rich": ("cli/",),
    "uvloop": ("node.py", "server/", "cli/"),
    "cryptography": ("crypto/", "certs.py"),
    "structlog": ("logs.py",),
    "prometheus_client": ("metrics.py",),
}


class Import(NamedTuple):
    """One import statement: `path` relative to the package, `module` in full."""

    path: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"elastickv/{self.path}:{self.line} imports {self.module}"


def modules_imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Every `(line, module)` that a file of `package` imports, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[:len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield node.lineno, module
            if module == "elastickv":
                # `from elastickv import kv` names a module of the package, not an attribute.
                yield from ((node.lineno, f"elastickv.{alias.name}") for alias in node.names)


def imports_of(path: Path) -> Iterator[Import]:
    relative = path.relative_to(PACKAGE)
    package = ".".join(("elastickv", *relative.parts[:-1]))
    for line, module in modules_imported(ast.parse(path.read_text(encoding="utf-8")), package):
        yield Import(relative.as_posix(), line, module)


def component(module: str) -> str:
    """`elastickv.kv.api` -> `kv`; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def importer(path: str) -> str:
    """`kv/api.py` -> `kv`; `node.py` -> `node`."""
    return Path(path).parts[0].removesuffix(".py")


def violation(item: Import) -> str:
    """Why an import breaks the table; "" if it does not."""
    name = importer(item.path)
    root = item.module.split(".")[0]
    if root != "elastickv":
        allowed = ONLY_IMPORTERS.get(root)
        if allowed and not item.path.startswith(allowed):
            return f"{item}: only {', '.join(allowed)} may import {root}"
        return ""
    target = component(item.module)
    if name == "__init__" or target in ("", "__version__"):
        return ""
    if target == GENERATED:
        return "" if name in MAY_IMPORT_GENERATED else f"{item}: this layer does not know gRPC"
    if target not in LAYERS:
        return f"{item}: {target} is in no layer; add it to the table"
    if name == "client" and LAYERS[target] > 0 and target != "client":
        return f"{item}: the client imports L0 and stubs only"
    if LAYERS[target] > LAYERS[name]:
        return f"{item}: L{LAYERS[name]} must not import L{LAYERS[target]}"
    return ""


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py")
                  if path.relative_to(PACKAGE).parts[0] != GENERATED)


def test_the_document_has_the_same_layers() -> None:
    document = (PACKAGE.parent / "docs" / "internals" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| L(\d) \| `([^`]+)`", document, re.MULTILINE)
    documented = {name: int(layer) for layer, names in rows for name in names.split()}
    assert documented == {name: layer for name, layer in LAYERS.items() if name != "__main__"}


def test_every_module_is_in_a_layer() -> None:
    names = {importer(path.relative_to(PACKAGE).as_posix()) for path in source_files()}
    assert names - {"__init__"} <= set(LAYERS)


def test_imports_point_downward() -> None:
    files = source_files()
    assert len(files) > 10
    found = [reason for path in files for item in imports_of(path)
             if (reason := violation(item))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("path", "source", "allowed"), [
    ("kv/fsm.py", "from elastickv.keys import applier", True),
    ("kv/fsm.py", "from elastickv.server import health", False),
    ("kv/fsm.py", "def f():\n    import elastickv.server.health", False),
    ("errors.py", "import grpc", False),
    ("errors.py", "from elastickv import wire", False),
    ("raft/journal.py", "from . import engine", True),
    ("raft/journal.py", "from ..kv import api", False),
    ("raft/journal.py", "import pysyncobj.syncobj", False),
    ("raft/pysyncobj_engine.py", "import pysyncobj.syncobj", True),
    ("store/lmdb_backend.py", "import lmdb", True),
    ("keys/registry.py", "import lmdb", False),
    ("client/aio.py", "from elastickv.errors import NoLeader", True),
    ("client/aio.py", "from elastickv.pb import service_pb2", True),
    ("client/aio.py", "from elastickv.kv.api import Op", False),
    ("kv/api.py", "from elastickv.pb import service_pb2", False),
    ("cli/main.py", "from elastickv import __version__", True),
    ("kv/api.py", "import elastickv.unheard_of", False),
], ids=lambda value: value if isinstance(value, str) else "")
def test_the_check_itself(path: str, source: str, allowed: bool) -> None:
    package = ".".join(("elastickv", *Path(path).parts[:-1]))
    found = [reason for line, module in modules_imported(ast.parse(source), package)
             if (reason := violation(Import(path, line, module)))]
    assert bool(found) != allowed
