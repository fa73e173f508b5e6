"""`python -m tests.sim`: many seeds, or one in detail."""

from __future__ import annotations

from tests.sim.runner import main

if __name__ == "__main__":
    raise SystemExit(main())
