"""Lets the modules here share `memory_node` (of tests/server) and `h2_peer`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
