"""Handles do not give their bytes away, and a keystore never changes under a reader."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import traceback

import pytest

from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.errors import EncryptionConflict, InvalidArgument

DEK = b"\xa5\x5a" * 16
OTHER = bytes(range(32))


def handle(key_id: int = 7, purpose: Purpose = Purpose.STORAGE, dek: bytes = DEK) -> KeyHandle:
    return KeyHandle(key_id, purpose, dek)


def shows(text: str) -> bool:
    """Whether any usual spelling of the key is in `text`."""
    return any(spelling in text for spelling in (
        DEK.hex(), DEK.hex().upper(), repr(DEK), repr(DEK)[2:-1], DEK.decode("latin-1")))


def test_no_rendering_shows_the_key() -> None:
    key = handle()
    keystore = Keystore({7: key})
    renderings = [repr(key), str(key), f"{key}", f"{key!r:>80}", f"{key:>40}", repr(keystore),
                  f"{keystore}", repr([key]), repr({"key": key}), "%s" % key]  # noqa: UP031
    for text in renderings:
        assert not shows(text)
    assert "7" in repr(key)


def test_a_traceback_and_a_log_record_do_not_show_the_key(
        caplog: pytest.LogCaptureFixture) -> None:
    key = handle()
    try:
        key.aead[1].decrypt(bytes(12), bytes(20), None)  # type: ignore[union-attr]
    except Exception:  # the text is the subject here, whatever the type
        assert not shows(traceback.format_exc())
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").debug("%r %s", key, Keystore({7: key}))
    assert not shows(caplog.text)


def test_no_attribute_holds_the_key() -> None:
    key = handle()
    assert not hasattr(key, "__dict__")
    for name in dir(key):
        if not name.startswith("__"):
            value = getattr(key, name)
            assert value != DEK
            assert not shows(repr(value))
    for referent in gc.get_referents(key):
        assert referent != DEK


@pytest.mark.parametrize("duplicate", [
    pickle.dumps, copy.copy, copy.deepcopy,
    *(lambda value, protocol=protocol: pickle.dumps(value, protocol)
      for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
    lambda value: value.__reduce__(), lambda value: value.__getstate__()])
@pytest.mark.parametrize("value", [handle(), Keystore({7: handle()})], ids=["handle", "keystore"])
def test_keys_cannot_be_copied_or_serialized(value: object, duplicate: object) -> None:
    with pytest.raises(TypeError, match="cannot be copied or serialized"):
        duplicate(value)  # type: ignore[operator]


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_dek_has_32_bytes(length: int) -> None:
    with pytest.raises(InvalidArgument):
        handle(dek=bytes(length))


@pytest.mark.parametrize("key_id", [-1, 0, 2 ** 32])
def test_a_key_id_has_32_bits_and_is_not_0(key_id: int) -> None:
    with pytest.raises(InvalidArgument):
        handle(key_id)


def test_the_same_bytes_are_recognised_under_any_id() -> None:
    assert handle(7).same_key(handle(8, Purpose.RAFT))
    assert not handle(7).same_key(handle(7, dek=OTHER))


def test_with_key_leaves_the_old_keystore_alone() -> None:
    empty = Keystore()
    one = empty.with_key(handle(7))
    two = one.with_key(handle(3, dek=OTHER))
    assert (empty.ids(), one.ids(), two.ids()) == ((), (7,), (3, 7))
    assert len(two) == 2
    assert 3 in two
    assert 4 not in two
    assert two.get(4) is None


def test_the_same_key_again_changes_nothing() -> None:
    keystore = Keystore().with_key(handle())
    assert keystore.with_key(handle()) is keystore


def test_the_same_key_with_another_purpose_takes_the_new_purpose() -> None:
    keystore = Keystore().with_key(handle()).with_key(handle(purpose=Purpose.RAFT))
    held = keystore.get(7)
    assert held is not None
    assert held.purpose is Purpose.RAFT


def test_another_key_under_a_taken_id_is_a_conflict() -> None:
    keystore = Keystore().with_key(handle())
    with pytest.raises(EncryptionConflict, match="key id 7"):
        keystore.with_key(handle(dek=OTHER))
    assert keystore.get(7) is not None


def test_a_handle_is_kept_under_its_own_id() -> None:
    with pytest.raises(InvalidArgument):
        Keystore({8: handle(7)})


def test_the_keystore_copies_the_mapping_it_is_given() -> None:
    handles = {7: handle()}
    keystore = Keystore(handles)
    handles.clear()
    assert keystore.ids() == (7,)
