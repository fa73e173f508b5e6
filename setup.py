"""Build step: a wheel or an install from a clean checkout generates the gRPC stubs first."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))

STUBS = "elastickv.pb"


class BuildWithStubs(build_py):
    """`build_py`, preceded by `scripts/generate_stubs.py`."""

    def finalize_options(self) -> None:
        from generate_stubs import generate

        generate()
        # The search for packages came before the stubs.
        if STUBS not in self.distribution.packages:
            self.distribution.packages.append(STUBS)
        super().finalize_options()


setup(cmdclass={"build_py": BuildWithStubs})
