"""Generate `elastickv/pb/` from `proto/`.

protoc writes `import other_pb2` (a top-level import); the stubs live inside a package, so those
lines become `from elastickv.pb import other_pb2`. A file is only replaced when its content changes,
so that an editable install and running tools do not see needless rewrites.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGE = ROOT / "elastickv" / "pb"
INIT = '"""Generated from proto/ by scripts/generate_stubs.py."""\n'

_TOP_LEVEL_IMPORT = re.compile(r"^import (\w+_pb2(?:_grpc)?)( as \w+)?$", re.MULTILINE)


def package_imports(source: str, modules: set[str]) -> str:
    """`source` with imports of sibling `modules` made relative to the package."""

    def rewrite(match: re.Match[str]) -> str:
        module, alias = match.group(1), match.group(2) or ""
        if module not in modules:
            return match.group(0)
        return f"from elastickv.pb import {module}{alias}"

    return _TOP_LEVEL_IMPORT.sub(rewrite, source)


def run_protoc(output: Path) -> None:
    """Run protoc with the Python, gRPC and typing plugins into `output`."""
    scripts = str(Path(sys.executable).parent) + os.pathsep + sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}",
        f"--python_out={output}", f"--grpc_python_out={output}",
        f"--mypy_out=quiet:{output}", f"--mypy_grpc_out=quiet:{output}",
        *sorted(str(path) for path in PROTO.glob("*.proto")),
    ]
    subprocess.run(command, check=True, env=environment)


def replace_if_changed(path: Path, content: str) -> bool:
    """Atomically write `content` unless `path` already holds it."""
    if path.exists() and path.read_text(encoding="utf-8") == content:
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
    return True


def generate() -> int:
    """Bring `elastickv/pb/` up to date; the number of files that changed."""
    PACKAGE.mkdir(exist_ok=True)
    changed = replace_if_changed(PACKAGE / "__init__.py", INIT)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory)
        run_protoc(output)
        generated = sorted(path for path in output.iterdir() if path.suffix in (".py", ".pyi"))
        modules = {path.stem for path in generated}
        for path in generated:
            source = package_imports(path.read_text(encoding="utf-8"), modules)
            changed += replace_if_changed(PACKAGE / path.name, source)
    for stale in PACKAGE.glob("*_pb2*"):
        if stale.stem not in modules:
            stale.unlink()
            changed += 1
    return changed


if __name__ == "__main__":
    print(f"{generate()} generated file(s) changed in {PACKAGE.relative_to(ROOT)}")
