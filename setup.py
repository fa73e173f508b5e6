"""Build step: a wheel or an install from a clean checkout generates the gRPC stubs first."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))


class BuildWithStubs(build_py):
    """`build_py`, preceded by `scripts/generate_stubs.py`."""

    def run(self) -> None:
        from generate_stubs import generate

        generate()
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
