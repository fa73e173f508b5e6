"""The key-value and encryption logic above Raft and below the servers."""
