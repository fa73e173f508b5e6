"""No plaintext of any written value in any file: at the end in all, in small ones during the run.

Values carry secrets (`values.py`). What is looked for are pieces of those, so that a value that
lost some of its bytes is found as well, in the forms in which programs leave bytes behind: as they
are, hexadecimal, base64, UTF-16, with or without line breaks, and behind the header of zlib or
gzip.

Nor is any key in a file, but the KEK in its own: see `audit_keys`.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import mmap
import os
import re
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from jepsen.verdict import Verdict, judge

PIECE_BYTES = 12
"""What is looked for at a time: short enough for a damaged copy, and not met by chance."""

STEP_BYTES = 10
SMALL_FILE_BYTES = 1 << 20
"""Up to this size a file is also searched without its white space, and during the run."""

POLL_S = 0.1
KNOWN_FILES = ("*.mdb", "*.mdb-lock", "*.log", "*.spare")
"""Stores and journals: large, and searched at the end."""

SHARED_DIRECTORIES = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))  # noqa: S108
"""What is left there by a program that does not ask for the directory of temporary files."""
SHARED_EVERY = 10
"""Looks between two at those, where others may have thousands of files."""
IN_MEMORY = "/memfd:"
"""With this begins the name of an open file that is on no disk."""

_COMPRESSED = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")
_COMPRESSED_BYTES = 4096
"""What is read of a stream at a time."""
_CLEAR_BYTES = 1 << 20
"""What is made of it at a time, at most."""
_ANY_HEADER = 47
"""`wbits` of zlib for either header."""

_WHITE_SPACE = b" \t\r\n"

WORD_BYTES = 8
KEY_PIECE_BYTES = 16
"""Half a key. No form of it is shorter than two words less a byte, and so each holds a word that
lies at a multiple of its size, wherever the form lies."""

Needles = Sequence[tuple[str, bytes]]


def pieces(secret: bytes) -> list[bytes]:
    """Overlapping pieces, of which any 22 consecutive bytes of `secret` hold one."""
    last = len(secret) - PIECE_BYTES
    return [secret[at:at + PIECE_BYTES] for at in sorted({*range(0, last, STEP_BYTES), last})]


def disguises(piece: bytes) -> dict[str, bytes]:
    """The forms in which a piece could lie in a file: as it is, as hexadecimal digits, in UTF-16,
    and in base64 at each of its three alignments (without the characters that depend on the
    neighbouring bytes)."""
    forms = {"bytes": piece, "hex": piece.hex().encode(), "HEX": piece.hex().upper().encode(),
             "utf-16": b"\0".join(bytes([byte]) for byte in piece)}
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + piece)
        end = (shift + len(piece)) * 8 // 6
        forms[f"base64+{shift}"] = text[-(-shift * 8 // 6):end]
    return forms


def needles_of(secrets: Iterable[bytes]) -> Needles:
    """Everything to look for."""
    return [(name, form) for secret in secrets for piece in pieces(secret)
            for name, form in disguises(piece).items()]


def find(data: bytes | mmap.mmap, needles: Needles) -> str:
    """Where and how a needle lies in `data`; "" when none does."""
    found = _find_plain(data, needles)
    if not found and len(data) <= SMALL_FILE_BYTES:
        found = _find_plain(bytes(data).translate(None, _WHITE_SPACE), needles)
        found = found and f"{found}, white space left out"
    return found or _find_compressed(data, needles)


def _find_plain(data: bytes | mmap.mmap, needles: Needles) -> str:
    for name, needle in needles:
        at = data.find(needle)
        if at >= 0:
            return f"{name} at byte {at}"
    return ""


def _find_compressed(data: bytes | mmap.mmap, needles: Needles) -> str:
    longest = max((len(needle) for _, needle in needles), default=0)
    for match in _COMPRESSED.finditer(data):
        at, before = match.start(), b""
        for clear in _decompressed(data, at):
            if found := _find_plain(before + clear, needles):
                return f"{found} of a piece of what is compressed at byte {at}"
            before = (before + clear)[-longest:]
    return ""


def _decompressed(data: bytes | mmap.mmap, at: int) -> Iterator[bytes]:
    """What is compressed from byte `at` on, piece by piece, as far as it can be read. What only
    looks like a header is soon no stream."""
    stream = zlib.decompressobj(_ANY_HEADER)
    with contextlib.suppress(zlib.error):
        while not stream.eof and (piece := stream.unconsumed_tail
                                  or data[at:at + _COMPRESSED_BYTES]):
            if not stream.unconsumed_tail:
                at += len(piece)
            yield stream.decompress(piece, _CLEAR_BYTES)


def files_below(roots: Iterable[Path]) -> Iterator[Path]:
    """Every regular file below `roots`."""
    for root in roots:
        yield from (path for path in sorted(root.rglob("*"))
                    if path.is_file() and not path.is_symlink())


def audit_plaintext(roots: Sequence[Path], secrets: Sequence[bytes], *, written: int = 1,
                    seen: Sequence[str] = ()) -> Verdict:
    """Search every file below `roots` for every piece of the secrets in every form.

    `seen` is what a `LeakWatch` found before. Unknown when there was nothing to search, or when no
    value with these secrets was `written`.
    """
    needles = needles_of(secrets)
    problems = list(seen)
    file_count = byte_count = 0
    for path in files_below(roots):
        size = path.stat().st_size
        if not size:
            continue
        file_count += 1
        byte_count += size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if found := find(data, needles):
                problems.append(f"plaintext in {path}: {found}")
    unknown = [] if file_count and needles else ["there was nothing to search"]
    if not written:
        unknown.append("no value was written that must not be found")
    return judge("plaintext", problems, {"files": file_count, "bytes": byte_count,
                                         "secrets": len(secrets), "values": written}, unknown)


# --- keys ------------------------------------------------------------------------------------


class KeyNeedles:
    """The forms of many keys, looked for all at once: there may be hundreds of needles, and a
    search for each would take longer than the run."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """`keys` by their names in reports."""
        self._needles = [(f"{name} as {form}", needle) for name, key in keys.items()
                         for at in range(0, len(key), KEY_PIECE_BYTES)
                         for form, needle in key_forms(key[at:at + KEY_PIECE_BYTES]).items()]
        self._words = {int.from_bytes(needle[at:at + WORD_BYTES], sys.byteorder)
                       for _, needle in self._needles for at in range(WORD_BYTES)}

    def find(self, data: bytes | mmap.mmap) -> str:
        """Where and how a piece of a key lies in `data`; "" when none does."""
        found = self._find(data)
        if not found and len(data) <= SMALL_FILE_BYTES:
            found = self._find(bytes(data).translate(None, _WHITE_SPACE))
            found = found and f"{found}, white space left out"
        return found

    def _find(self, data: bytes | mmap.mmap) -> str:
        whole = len(data) // WORD_BYTES * WORD_BYTES
        with memoryview(data) as view, view[:whole] as words, words.cast("Q") as numbers:
            if self._words.isdisjoint(numbers):
                return ""
        return _find_plain(data, self._needles)


def key_forms(piece: bytes) -> dict[str, bytes]:
    """`disguises` of bytes that are no text, and as programs print such bytes."""
    forms = {name: form for name, form in disguises(piece).items() if name != "utf-16"}
    forms |= {f"{name}, for URLs": base64_for_urls(form) for name, form in forms.items()
              if name.startswith("base64")}
    printed = repr(piece)[2:-1]
    return forms | {"repr": printed.encode(), "repr in JSON": json.dumps(printed)[1:-1].encode(),
                    "numbers": ", ".join(map(str, piece)).encode(),
                    "numbers close together": ",".join(map(str, piece)).encode()}


def base64_for_urls(text: bytes) -> bytes:
    """Base64 in its other alphabet."""
    return text.translate(bytes.maketrans(b"+/", b"-_"))


def audit_keys(roots: Sequence[Path], keys: Mapping[str, bytes],
               holders: Collection[Path]) -> Verdict:
    """Search every file below `roots` but `holders` for half of any of `keys`, in many forms.

    Unknown when there was no key or nothing to search.
    """
    needles = KeyNeedles(keys)
    held = {path.resolve() for path in holders}
    problems = []
    file_count = 0
    for path in files_below(roots):
        if path.resolve() in held or not path.stat().st_size:
            continue
        file_count += 1
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if found := needles.find(data):
                problems.append(f"a key in {path}: {found}")
    unknown = [] if file_count and keys else ["there was nothing to search"]
    return judge("keys", problems, {"files": file_count, "keys": len(keys)}, unknown)


# --- during the run --------------------------------------------------------------------------


def is_known(path: Path) -> bool:
    """Whether a node's file is left to the search at the end, by its name."""
    return any(path.match(pattern) for pattern in KNOWN_FILES)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


class LeakWatch:
    """Looks into small files of running nodes as they come and go, in a thread: in their own
    directories, in those that all programs share for temporary files, and whatever else they have
    open, also where it has no name (any more)."""

    def __init__(self, directories: Mapping[str, Sequence[Path]], secrets: Sequence[bytes],
                 pids: Callable[[], Mapping[str, int]] = dict, *,
                 shared: Sequence[Path] = SHARED_DIRECTORIES) -> None:
        """`directories` are those of each node, `pids` the processes of those that run."""
        self._directories = [(node, directory) for node, own in directories.items()
                             for directory in own]
        self._shared = shared
        self._pids = pids
        self._needles = needles_of(secrets)
        self._looked_at: dict[Path, tuple[int, int, int]] = {}
        self._since_ns = time.time_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leak-watch", daemon=True)
        self.problems: list[str] = []
        self.error = ""
        """Why the watch ended early; "" while it goes on."""

    def start(self) -> None:
        """Look until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Look once more, and end. Idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            for turn in itertools.count(1):
                is_last = self._stop.wait(POLL_S)
                self.look(shared=is_last or turn % SHARED_EVERY == 0)
                if is_last:
                    return
        except Exception as error:  # Whatever it is, the audit has to know.
            self.error = f"the watch for leaks ended early: {type(error).__name__}: {error}"

    def look(self, *, shared: bool = True) -> None:
        """Search every small file that is new or has changed, in `shared` directories as well."""
        for node, pid in self._pids().items():
            # What is not a node's own goes away, and may be another's, or nothing to be opened.
            with contextlib.suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        self._look_behind(node, link)
        for node, directory in self._directories:
            with contextlib.suppress(FileNotFoundError):
                for path in directory.rglob("*"):
                    with contextlib.suppress(FileNotFoundError):
                        if not path.is_symlink() and not is_known(path):
                            self._look_into(f"{path} of {node}", path, path)
        for directory in self._shared if shared else ():
            with contextlib.suppress(OSError), os.scandir(directory) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        self._look_at_shared(entry)

    def _look_behind(self, node: str, link: Path) -> None:
        """Look into what a process has open."""
        name = os.readlink(link)
        if name.startswith("/") and not name.startswith(IN_MEMORY) \
                and not is_known(Path(name.removesuffix(" (deleted)"))):
            status = link.stat()
            # Descriptors are used again, so they are no name of what is behind them.
            self._look_into(f"{name}, which {node} had open,", link,
                            Path(f"{status.st_dev}:{status.st_ino}"))

    def _look_at_shared(self, entry: os.DirEntry[str]) -> None:
        """Look into what this user has written there since the watch was made."""
        status = entry.stat(follow_symlinks=False)
        if status.st_uid == os.geteuid() and status.st_mtime_ns >= self._since_ns:
            self._look_into(entry.path, Path(entry.path), Path(entry.path))

    def _look_into(self, what: str, path: Path, identity: Path) -> None:
        """Search one file, unless that was done."""
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return
        state = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._looked_at.get(identity) == state or status.st_size > SMALL_FILE_BYTES:
            return
        # What is there now may be something else: a directory, or a pipe, which must not block.
        with open(path, "rb", opener=_open_at_once) as file:
            if os.fstat(file.fileno()).st_ino != status.st_ino:
                return
            self._looked_at[identity] = state
            if found := find(file.read(), self._needles):
                self.problems.append(f"plaintext in {what} during the run: {found}")
