"""Fault injection against real clusters, and the checkers that judge what the clients saw.

The checkers (`linearizable`, `append`, `bank`, `unique_writes`, `scans`, `nonces`) are pure
functions of a history or of bytes, and are used by the simulator as well.
"""
