"""`python -m elastickv`: the same as the `elastickv` command."""

from elastickv.cli.main import main

main()
