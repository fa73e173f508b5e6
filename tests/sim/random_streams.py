"""Random draws of a run: one stream per purpose, all from one seed.

Separate streams keep runs comparable: a component that draws once more does not shift the others.
"""

from __future__ import annotations

import random


class Streams:
    """Named generators of one seed. The same (seed, name) gives the same draws in any process."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def stream(self, name: str) -> random.Random:
        """A new generator for `name`. A string seed is hashed with SHA-512, not with `hash()`."""
        return random.Random(f"{self._seed}/{name}")
