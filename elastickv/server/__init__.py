"""The gRPC surface: thin services over `kv.api` and `raft.engine`, translated once at the edge."""
