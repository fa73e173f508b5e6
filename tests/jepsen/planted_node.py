"""A build of the node with one bug in it, to show that the harness would find it.

The variable ELASTICKV_PLANTED_BUG names the bug; without it this is the node as it is. It lives
among the tests and is in no wheel. Run it like `python -m elastickv`:

    ELASTICKV_PLANTED_BUG=stale-reads python tests/jepsen/planted_node.py node --raftId ...
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "ELASTICKV_PLANTED_BUG"
ONE_IN = 25
"""How often a bug that strikes now and then does so."""

LEAK_S = 0.5
"""How long a file is there that is gone at the end."""


def plant_stale_reads() -> None:
    """Every member answers reads from what it has applied, without asking for a read index."""
    from elastickv.raft.pysyncobj_engine import PySyncObjEngine

    async def read_index(self: PySyncObjEngine, *, timeout_s: float) -> int:
        return self.status().applied_index

    PySyncObjEngine.read_index = read_index  # type: ignore[method-assign]


def plant_lost_acks() -> None:
    """Some entries are acknowledged and their writes dropped, on every replica alike."""
    from elastickv.store.mvcc_store import Store

    apply_group = Store.apply_group

    def drop_some(self: Store, index: int, writes: Sequence[Any], rows: Sequence[Any] = (),
                  meta: Mapping[bytes, bytes] | None = None) -> None:
        apply_group(self, index, () if index % ONE_IN == 0 else writes, rows, meta)

    Store.apply_group = drop_some  # type: ignore[method-assign]


def plant_nonce_reuse() -> None:
    """Some nonces are issued twice in a row."""
    from elastickv.crypto.nonce import NonceFactory

    issue = NonceFactory.next

    def repeat_some(self: NonceFactory) -> bytes:
        nonce = issue(self)
        if self.count % ONE_IN:
            return nonce
        return nonce[:4] + (self.count - 1).to_bytes(8, "big")

    NonceFactory.next = repeat_some  # type: ignore[method-assign]


def plant_plaintext_leak() -> None:
    """Some values are left in a temporary file of the data directory before they are sealed."""
    from elastickv.crypto import cipher

    seal = cipher.seal_record_value
    directory = Path(sys.argv[sys.argv.index("--raftDataDir") + 1])
    sealed = 0

    def seal_and_leak(*arguments: Any, **options: Any) -> bytes:
        nonlocal sealed
        sealed += 1
        if sealed % ONE_IN == 0:
            (directory / "spill.tmp").write_bytes(arguments[4])
        return seal(*arguments, **options)

    # Before any other module takes its own reference.
    cipher.seal_record_value = seal_and_leak  # type: ignore[assignment]


def plant_scratch_leak() -> None:
    """Some values are for a moment in a file where the node runs, before they are sealed."""
    from elastickv.crypto import cipher

    seal = cipher.seal_record_value
    sealed = 0

    def seal_and_leak(*arguments: Any, **options: Any) -> bytes:
        nonlocal sealed
        sealed += 1
        if sealed % ONE_IN == 0:
            spill = Path("spill.tmp")
            spill.write_bytes(arguments[4])
            threading.Timer(LEAK_S, spill.unlink, [True]).start()
        return seal(*arguments, **options)

    cipher.seal_record_value = seal_and_leak  # type: ignore[assignment]


def plant_key_leak() -> None:
    """Every key is kept in a file, as it is used."""
    from elastickv.crypto import keystore

    begin = keystore.KeyHandle.__init__
    directory = Path(sys.argv[sys.argv.index("--raftDataDir") + 1])

    def begin_and_leak(self: Any, key_id: int, purpose: Any, dek: bytes) -> None:
        begin(self, key_id, purpose, dek)
        (directory / f"key-{key_id}.cache").write_text(dek.hex())

    keystore.KeyHandle.__init__ = begin_and_leak  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    "stale-reads": plant_stale_reads,
    "lost-acks": plant_lost_acks,
    "nonce-reuse": plant_nonce_reuse,
    "plaintext-leak": plant_plaintext_leak,
    "scratch-leak": plant_scratch_leak,
    "key-leak": plant_key_leak,
}


def main() -> int:
    """Plant what the variable names, then be the node."""
    bug = os.environ.pop(VARIABLE, "")
    if bug:
        BUGS[bug]()
    from elastickv.cli.main import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
