"""elastickv: a Raft-replicated key-value store that keeps values and log entries encrypted
at rest."""

__version__ = "0.1.0"
