"""`python -m jepsen run` and `python -m jepsen all`."""

import os
import sys

# Nodes are killed on purpose; gRPC need not tell about each lost connection. Before its import.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from jepsen.cli import main

sys.exit(main(sys.argv[1:]))
