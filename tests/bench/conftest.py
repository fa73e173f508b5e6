"""The benchmark's modules are scripts beside each other; let the tests import them the same way."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
