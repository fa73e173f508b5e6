"""Wrapping DEKs."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.crypto.kek import WRAPPED_BYTES, Kek
from elastickv.crypto.keystore import Purpose
from elastickv.errors import KekError

KEY = bytes(range(32))


@given(st.binary(min_size=32, max_size=32))
def test_a_dek_unwraps_to_itself(dek: bytes) -> None:
    kek = Kek(KEY)
    wrapped = kek.wrap(dek)
    assert len(wrapped) == WRAPPED_BYTES == 60
    assert kek.unwrap(wrapped) == dek
    assert dek not in wrapped


def test_each_wrapping_has_its_own_nonce() -> None:
    kek = Kek(KEY)
    assert len({kek.wrap(bytes(32))[:12] for _ in range(50)}) == 50


def test_any_change_to_the_wrapped_form_is_refused() -> None:
    kek = Kek(KEY)
    wrapped = kek.wrap(bytes(32))
    changed = [wrapped[:i] + bytes((wrapped[i] ^ 1,)) + wrapped[i + 1:] for i in range(60)]
    for data in [*changed, b"", wrapped[:-1], wrapped + b"\x00"]:
        with pytest.raises(KekError):
            kek.unwrap(data)


def test_another_kek_does_not_unwrap_and_is_named_with_the_remedy() -> None:
    wrapped = Kek(KEY).wrap(bytes(32))
    with pytest.raises(KekError, match="from /etc/kek") as caught:
        Kek(bytes(32), source="/etc/kek").unwrap(wrapped)
    assert caught.value.remedy
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_kek_has_32_bytes(length: int) -> None:
    with pytest.raises(KekError, match=f"{length} bytes"):
        Kek(bytes(length))


@pytest.mark.parametrize("length", [0, 31, 33])
def test_only_a_dek_is_wrapped(length: int) -> None:
    with pytest.raises(KekError):
        Kek(KEY).wrap(bytes(length))


def test_a_generated_dek_is_wrapped_and_new() -> None:
    kek = Kek(KEY)
    first, second = (kek.unwrap_handle(kek.generate_wrapped_dek(), key_id, Purpose.RAFT)
                     for key_id in (1, 2))
    assert not first.same_key(second)
    assert (first.key_id, first.purpose) == (1, Purpose.RAFT)


class ForgetfulKek(Kek):
    """Unwraps to something else than it wrapped, as a broken provider would."""

    __slots__ = ()

    def unwrap(self, wrapped: bytes) -> bytes:
        return bytes(32)


def test_a_generated_dek_that_does_not_unwrap_is_refused() -> None:
    with pytest.raises(KekError, match="does not unwrap what it wrapped"):
        ForgetfulKek(KEY).generate_wrapped_dek()


def test_a_kek_shows_its_source_and_nothing_else() -> None:
    kek = Kek(KEY, source="/etc/kek")
    assert repr(kek) == "<Kek from /etc/kek>"
    assert not hasattr(kek, "__dict__")
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(kek)
