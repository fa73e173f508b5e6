"""elastickv: a Raft-replicated key-value store whose every byte at rest is ciphertext."""

__version__ = "0.1.0"
