"""elastickv.cli.values: bytes on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.cli import values
from elastickv.cli.output import display_bytes
from elastickv.client import Condition, Delete, Put
from elastickv.errors import ConfigError, InvalidArgument


@pytest.mark.parametrize(("text", "content"), [
    ("greeting", b"greeting"), ("", b""), ("grüße", "grüße".encode()), ("a b", b"a b"),
    ("base64:", b""), ("base64:AP8=", b"\x00\xff"), ("\udcff\udcfe", b"\xff\xfe")])
def test_parse_bytes(text: str, content: bytes) -> None:
    assert values.parse_bytes(text, "the key") == content


@pytest.mark.parametrize("text", ["base64:x", "base64:AP8", "base64:A P8=", "base64:ü"])
def test_bad_base64(text: str) -> None:
    with pytest.raises(InvalidArgument, match="the key is not valid base64"):
        values.parse_bytes(text, "the key")


@given(st.binary())
def test_what_is_shown_can_be_given_back(content: bytes) -> None:
    assert values.parse_bytes(display_bytes(content), "the key") == content


@given(st.binary(max_size=4), st.binary(max_size=4))
def test_a_prefix_range_holds_exactly_what_starts_with_it(prefix: bytes, key: bytes) -> None:
    end = values.prefix_end(prefix)
    assert (prefix <= key and (not end or key < end)) == key.startswith(prefix)


def test_read_value(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_bytes(b"base64:\x00")
    assert values.read_value("base64:AA==", None) == b"\0"
    assert values.read_value(None, path) == b"base64:\x00"


@pytest.mark.parametrize(("argument", "path"), [
    (None, None), ("v", Path("f")), (None, Path("/no/such/file")), (None, Path("/"))])
def test_values_that_cannot_be_read(argument: str | None, path: Path | None) -> None:
    with pytest.raises(ConfigError):
        values.read_value(argument, path)


@pytest.mark.parametrize(("text", "condition"), [
    ("a=0", Condition(b"a", 0)), ("a=b=12", Condition(b"a=b", 12)),
    ("base64:AA===3", Condition(b"\0", 3))])
def test_conditions(text: str, condition: Condition) -> None:
    assert values.parse_conditions([text]) == [condition]


@pytest.mark.parametrize("text", ["", "a", "a=", "a=-1", "a=x", "a=²", "a=18446744073709551616",
                                  "a=" + "9" * 5000])
def test_conditions_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--if"):
        values.parse_conditions([text])


@pytest.mark.parametrize(("words", "ops"), [
    ([], []),
    (["put", "a", "1"], [Put(b"a", b"1")]),
    (["put", "put", "delete", "delete", "delete"], [Put(b"put", b"delete"), Delete(b"delete")]),
    (["delete", "base64:AA=="], [Delete(b"\0")]),
])
def test_operations(words: list[str], ops: list[Put | Delete]) -> None:
    assert values.parse_operations(words) == ops


@pytest.mark.parametrize("words", [["put"], ["put", "a"], ["delete"], ["get", "a"], ["PUT", "a"]])
def test_operations_that_are_none(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        values.parse_operations(words)


def test_lines() -> None:
    lines = ['{"op": "put", "key": "a", "value": "1"}', "", "  \n",
             '{"op": "put", "key": "b", "value": "base64:AA==", "ttl_ms": 5}',
             '{"op": "delete", "key": "c"}']
    assert list(values.parse_lines(lines)) == [Put(b"a", b"1"), Put(b"b", b"\0", 5), Delete(b"c")]


@pytest.mark.parametrize("line", [
    "nonsense", "[]", "1", "null", "{}", '{"op": "get", "key": "a"}', '{"op": "put", "key": "a"}',
    '{"op": "put", "key": 1, "value": "1"}', '{"op": "put", "key": "a", "value": null}',
    '{"op": "put", "key": "a", "value": "1", "ttl": 5}',
    '{"op": "put", "key": "a", "value": "1", "ttl_ms": -1}',
    '{"op": "put", "key": "a", "value": "1", "ttl_ms": "5"}',
    '{"op": "put", "key": "a", "value": "1", "ttl_ms": true}',
    '{"op": "put", "key": "base64:x", "value": "1"}',
    '{"op": "delete", "key": "a", "value": "1"}', '{"op": "delete", "key": "\\ud800"}',
    "[" * 100_000])
def test_lines_that_are_none(line: str) -> None:
    with pytest.raises(InvalidArgument, match="line 2"):
        list(values.parse_lines(['{"op": "delete", "key": "a"}', line]))
