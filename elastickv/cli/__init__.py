"""The `elastickv` command."""
