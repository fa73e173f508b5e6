"""Envelopes, nonces and keys. Raw key bytes never leave this package."""
