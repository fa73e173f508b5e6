"""What every member knows of the keys: sidecar, writer registry, and the rules that change them."""
