"""The consensus engine: PySyncObj, hardened, behind the protocol in `engine.py`."""
