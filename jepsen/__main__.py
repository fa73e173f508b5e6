"""`python -m jepsen run` and `python -m jepsen all`."""

import sys

from jepsen.cli import main

sys.exit(main(sys.argv[1:]))
