"""Entries that a leader sealed itself and need not decrypt."""

from __future__ import annotations

import pytest

from elastickv.crypto.cipher import seal_raft
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.errors import IntegrityError
from elastickv.kv.fsm import open_payload
from elastickv.kv.own_entries import MOST_ENTRIES, MOST_ENTRY_BYTES, OwnEntries

HANDLE = KeyHandle(7, Purpose.RAFT, bytes(range(32)))


def sealed(clear: bytes, nonce: int = 1) -> bytes:
    return seal_raft(HANDLE, nonce.to_bytes(12, "big"), clear)


def test_an_own_entry_is_known_once() -> None:
    own = OwnEntries()
    own.add(sealed(b"clear"), b"clear")
    assert own.take(sealed(b"clear")) == b"clear"
    assert own.take(sealed(b"clear")) is None


@pytest.mark.parametrize("other", [
    pytest.param(sealed(b"clear")[:-1] + b"\0", id="another tag"),
    pytest.param(sealed(b"clear")[:-1], id="cut"),
    pytest.param(sealed(b"clear") + b"\0", id="longer"),
    pytest.param(sealed(b"other"), id="another text under the same nonce"),
    pytest.param(sealed(b"clear", nonce=2), id="another nonce"),
    pytest.param(b"", id="nothing"),
])
def test_other_bytes_are_not_known(other: bytes) -> None:
    own = OwnEntries()
    own.add(sealed(b"clear"), b"clear")
    assert own.take(other) is None
    assert own.take(sealed(b"clear")) == b"clear"


def test_the_oldest_are_forgotten() -> None:
    own = OwnEntries()
    for nonce in range(MOST_ENTRIES + 1):
        own.add(sealed(b"%d" % nonce, nonce), b"%d" % nonce)
    assert own.take(sealed(b"0", 0)) is None
    assert [own.take(sealed(b"%d" % nonce, nonce)) for nonce in range(1, MOST_ENTRIES + 1)] \
        == [b"%d" % nonce for nonce in range(1, MOST_ENTRIES + 1)]


def test_large_ones_are_not_kept() -> None:
    own = OwnEntries()
    clear = bytes(MOST_ENTRY_BYTES + 1)
    own.add(sealed(clear), clear)
    assert own.take(sealed(clear)) is None


def test_only_what_is_not_its_own_is_decrypted() -> None:
    """The keystore is empty: what comes out without an error was not decrypted."""
    own = OwnEntries()
    own.add(sealed(b"clear"), b"clear")
    assert open_payload(sealed(b"clear"), 9, 7, Keystore(), own) == b"clear"
    with pytest.raises(IntegrityError):
        open_payload(sealed(b"clear"), 9, 7, Keystore(), own)


def test_up_to_the_cutover_nothing_is_taken_for_an_envelope() -> None:
    own = OwnEntries()
    own.add(sealed(b"clear"), b"clear")
    assert open_payload(sealed(b"clear"), 7, 7, Keystore(), own) == sealed(b"clear")
