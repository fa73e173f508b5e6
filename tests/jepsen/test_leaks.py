"""A planted plaintext is found in every disguise, damaged, packed or short-lived."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import socket
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from jepsen.leaks import (
    WORD_BYTES,
    LeakWatch,
    audit_keys,
    audit_plaintext,
    disguises,
    find,
    key_forms,
    needles_of,
    pieces,
)
from jepsen.values import Codec
from jepsen.verdict import Validity

MARKER = b"8c1f2ab0d3e4957786aa01bc55d0e9f2"
UNIT = b"0f5e77b1c2d3a49688aa35bc12d0e4c7"
SECRETS = (MARKER, UNIT)

DISGUISES: dict[str, Callable[[bytes], bytes]] = {
    "bytes": lambda value: value,
    "without its first bytes": lambda value: value[9:],
    "without its last bytes": lambda value: value[:-9],
    "without its marker": lambda value: value[33:],
    "split": lambda value: value[:24] + os.urandom(4096) + value[24:],
    "hex": lambda value: value.hex().encode(),
    "HEX": lambda value: value.hex().upper().encode(),
    "hex with spaces": lambda value: re.sub(b"(..)", rb"\1 ", value.hex().encode()),
    "base64": base64.b64encode,
    "base64, 1 byte later": lambda value: base64.b64encode(b"x" + value),
    "base64, 2 bytes later": lambda value: base64.b64encode(b"xy" + value + b"tail"),
    "base64 in lines": base64.encodebytes,
    "repr": lambda value: repr({"value": value}).encode(),
    "utf-16": lambda value: value.decode().encode("utf-16-le"),
    "zlib": zlib.compress,
    "gzip": gzip.compress,
    "gzip, late": lambda value: gzip.compress(os.urandom(100_000) + value),
    "gzip, behind much": lambda value: gzip.compress(bytes(5_000_000) + value),
    "gzip, cut short": lambda value: gzip.compress(
        os.urandom(20_000) + value + os.urandom(20_000))[:-9_000],
}


def value() -> bytes:
    return b"|".join((MARKER, UNIT * 3, b"17"))


@pytest.mark.parametrize("disguise", DISGUISES)
def test_finds_plaintext_in_every_disguise(tmp_path: Path, disguise: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "clean").write_bytes(os.urandom(10_000))
    assert audit_plaintext([tmp_path], SECRETS).is_valid
    hidden = DISGUISES[disguise](value())
    (tmp_path / "deep" / "spill").write_bytes(os.urandom(9_000) + hidden + os.urandom(50))
    verdict = audit_plaintext([tmp_path], SECRETS)
    assert verdict.validity is Validity.INVALID
    assert "deep/spill" in verdict.problems[0]


@pytest.mark.parametrize("size", range(22, 33))
def test_any_long_piece_of_a_secret_is_found(size: int) -> None:
    needles = needles_of([MARKER])
    for start in range(len(MARKER) - size + 1):
        assert find(MARKER[start:start + size], needles)


def test_nothing_to_search_is_not_a_pass(tmp_path: Path) -> None:
    assert audit_plaintext([tmp_path], SECRETS).validity is Validity.UNKNOWN
    (tmp_path / "file").write_bytes(b"content")
    assert audit_plaintext([tmp_path], []).validity is Validity.UNKNOWN
    assert audit_plaintext([tmp_path], SECRETS, written=0).validity is Validity.UNKNOWN


def test_a_disguise_is_long_enough_not_to_be_found_by_chance() -> None:
    assert all(len(form) >= 12 for piece in pieces(MARKER) for form in disguises(piece).values())


def test_values_of_a_run_are_found_by_their_secrets() -> None:
    codec = Codec(lambda: True)
    needles = needles_of(codec.sealed_secrets)
    for number in range(8):
        written = codec.encode(number)
        assert find(written, needles)
        assert find(written[8:], needles)
    assert not find(Codec(lambda: True).encode(1), needles)


# --- keys ------------------------------------------------------------------------------------


KEY = bytes.fromhex("00ff27b1c2d3a49688aa35bc12d0e4c75c0a22f3e4957786aa01bc55d0e9f27f")

KEY_FORMS: dict[str, Callable[[bytes], bytes]] = {
    "bytes": lambda key: key,
    "its first half": lambda key: key[:16],
    "its second half": lambda key: key[16:],
    "hex": lambda key: key.hex().encode(),
    "HEX": lambda key: key.hex().upper().encode(),
    "hex with spaces": lambda key: re.sub(b"(..)", rb"\1 ", key.hex().encode()),
    "base64": base64.b64encode,
    "base64, 1 byte later": lambda key: base64.b64encode(b"x" + key),
    "base64, 2 bytes later": lambda key: base64.b64encode(b"xy" + key + b"tail"),
    "base64 for URLs": base64.urlsafe_b64encode,
    "repr": lambda key: repr({"key": key}).encode(),
    "repr in JSON": lambda key: json.dumps({"key": repr(key)}).encode(),
    "numbers": lambda key: repr(list(key)).encode(),
    "numbers in JSON": lambda key: json.dumps(list(key), separators=(",", ":")).encode(),
}


@pytest.mark.parametrize("form", KEY_FORMS)
@pytest.mark.parametrize("before", [9_000, 9_003])
def test_finds_a_key_in_every_form(tmp_path: Path, form: str, before: int) -> None:
    holder = tmp_path / "kek.key"
    holder.write_bytes(KEY)
    (tmp_path / "clean").write_bytes(os.urandom(10_001))
    keys = {"DEK 7": os.urandom(32), "KEK": KEY}
    assert audit_keys([tmp_path], keys, [holder]).is_valid
    (tmp_path / "spill").write_bytes(os.urandom(before) + KEY_FORMS[form](KEY))
    verdict = audit_keys([tmp_path], keys, [holder])
    assert verdict.validity is Validity.INVALID
    [problem] = verdict.problems
    assert "spill: KEK as " in problem


def test_without_keys_or_files_nothing_is_known_of_keys(tmp_path: Path) -> None:
    holder = tmp_path / "kek.key"
    holder.write_bytes(KEY)
    assert audit_keys([tmp_path], {"KEK": KEY}, [holder]).validity is Validity.UNKNOWN
    (tmp_path / "file").write_bytes(b"content")
    assert audit_keys([tmp_path], {}, [holder]).validity is Validity.UNKNOWN
    assert audit_keys([tmp_path], {"KEK": KEY}, [holder]).is_valid


def test_a_key_in_its_own_file_is_none_in_a_run_directory_by_whatever_path(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = tmp_path / "run" / "kek.key"
    holder.parent.mkdir()
    holder.write_bytes(KEY)
    (tmp_path / "run" / "file").write_bytes(b"content")
    monkeypatch.chdir(tmp_path)
    assert audit_keys([Path("run")], {"KEK": KEY}, [holder]).is_valid
    assert audit_keys([holder.parent], {"KEK": KEY}, [Path("run/kek.key")]).is_valid


def test_each_form_of_half_a_key_holds_a_word_wherever_it_lies() -> None:
    for half in (KEY[:16], KEY[16:], bytes(16), b"x" * 16):
        assert all(len(form) >= 2 * WORD_BYTES - 1 for form in key_forms(half).values())


# --- during the run --------------------------------------------------------------------------


def test_a_file_that_is_gone_at_the_end_was_seen(tmp_path: Path) -> None:
    data = tmp_path / "n1"
    data.mkdir()
    watch = LeakWatch({"n1": [tmp_path / "other", data], "n2": [tmp_path / "nowhere"]}, SECRETS)
    (data / "harmless").write_bytes(b"content")
    watch.look()
    assert watch.problems == []
    spill = data / "spill.tmp"
    spill.write_bytes(value())
    watch.look()
    watch.look()
    spill.unlink()
    watch.look()
    assert len(watch.problems) == 1
    assert "spill.tmp of n1 during the run" in watch.problems[0]
    assert audit_plaintext([data], SECRETS, seen=watch.problems).validity is Validity.INVALID


@pytest.mark.parametrize("has_name", [True, False])
def test_a_file_that_a_node_has_open_was_seen(tmp_path: Path, has_name: bool) -> None:
    watch = LeakWatch({}, SECRETS, lambda: {"n1": os.getpid(), "n2": 1 << 22}, shared=())
    with (open(tmp_path / "spill", "w+b") if has_name
          else tempfile.TemporaryFile(dir=tmp_path)) as spill:
        spill.write(b"harmless")
        spill.flush()
        watch.look()
        assert watch.problems == []
        spill.write(value())
        spill.flush()
        watch.look()
        watch.look()
        assert spill.tell() == 8 + len(value())
    assert len(watch.problems) == 1
    assert "which n1 had open, during the run" in watch.problems[0]


@pytest.mark.parametrize("later", ["directory", "pipe", "socket", "nothing"])
def test_a_descriptor_that_is_used_again_meanwhile_ends_no_watch(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str) -> None:
    """Between the look at what it is and its opening."""
    watch = LeakWatch({}, SECRETS, lambda: {"n1": os.getpid()}, shared=())
    look_into, other = watch._look_into, tmp_path / "other"
    with (tmp_path / "spill").open("w+b") as spill, socket.socket(socket.AF_UNIX) as listening:
        spill.write(value())
        spill.flush()

        def change(what: str, path: Path, identity: Path) -> None:
            status = path.stat()
            if what.startswith(str(tmp_path / "spill")):
                monkeypatch.setattr(Path, "stat", lambda path, **options: status)
                path = other
            look_into(what, path, identity)
            monkeypatch.undo()

        if later == "directory":
            other.mkdir()
        elif later == "pipe":
            os.mkfifo(other)
        elif later == "socket":
            listening.bind(str(other))
        watch._look_into = change  # type: ignore[method-assign]
        watch.start()
        watch.stop()
    assert watch.error == ""
    assert watch.problems == []


def test_what_a_node_leaves_where_all_programs_do_was_seen(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.write_bytes(value())
    os.utime(before, (1, 1))
    watch = LeakWatch({}, SECRETS, shared=[tmp_path, tmp_path / "nowhere"])
    (tmp_path / "link").symlink_to(before)
    os.mkfifo(tmp_path / "fifo")
    watch.look()
    assert watch.problems == []
    (tmp_path / "spill.log").write_bytes(value())
    watch.start()
    watch.stop()
    assert watch.error == ""
    assert len(watch.problems) == 1
    assert "spill.log during the run" in watch.problems[0]


def test_the_watch_ends(tmp_path: Path) -> None:
    watch = LeakWatch({"n1": [tmp_path]}, SECRETS)
    watch.stop()
    watch.start()
    watch.stop()
    assert watch.error == ""
