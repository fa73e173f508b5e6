"""elastickv.server.grpc_message: what a status's detail is on the wire."""

from __future__ import annotations

import operator
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.server.grpc_message import MAX_DETAIL_BYTES, fitted, percent_encoded


@pytest.mark.parametrize("byte", range(0x80), ids=lambda byte: f"{byte:#04x}")
def test_printable_ascii_except_percent_stands_for_itself(byte: int) -> None:
    as_it_is = 0x20 <= byte <= 0x7E and chr(byte) != "%"
    assert percent_encoded(chr(byte)) == (bytes((byte,)) if as_it_is else b"%%%02X" % byte)


@pytest.mark.parametrize(("text", "encoded"), [
    ("", b""), ("é", b"%C3%A9"), ("a\ud800b", b"a?b"), ("100% €", b"100%25 %E2%82%AC")])
def test_what_is_no_ascii(text: str, encoded: bytes) -> None:
    assert percent_encoded(text) == encoded


@given(st.text(max_size=200))
def test_percent_encoding(text: str) -> None:
    encoded = percent_encoded(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    expected = text.encode("utf-8", "replace").decode()
    assert urllib.parse.unquote(encoded.decode("ascii")) == expected


@given(st.text() | st.text(min_size=MAX_DETAIL_BYTES // 12)
       | st.text("aé€𝄞%\ud800\n", min_size=MAX_DETAIL_BYTES // 12)
       | st.builds(operator.mul, st.text(min_size=1, max_size=10), st.integers(0, 5_000)))
def test_a_detail_fits_into_headers(text: str) -> None:
    detail = fitted(text)
    assert len(percent_encoded(detail)) <= MAX_DETAIL_BYTES
    whole = text.encode("utf-8", "replace").decode()
    if len(percent_encoded(whole)) <= MAX_DETAIL_BYTES:
        assert detail == whole
    else:
        assert whole.startswith(detail.removesuffix("..."))
        assert detail.endswith("...")
        assert len(percent_encoded(detail)) > MAX_DETAIL_BYTES - 12
