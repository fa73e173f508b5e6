"""The audit: a sound file passes, a damaged one is refused, and what passes reads right."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastickv.clock import pack_timestamp
from elastickv.errors import ExitCode, StoreCorrupt
from elastickv.store import lmdb_format as fmt
from elastickv.store.audit import audit_file, audit_image, newest_meta
from elastickv.store.audit_process import BackgroundAudit, main
from elastickv.store.gc import Compactor
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.lmdb_environment import LOCK_FILE_BYTES, lock_file_of
from elastickv.store.mvcc_store import Store
from elastickv.store.tables import Table, WriteBatch
from elastickv.store.values import plain_record
from tests.store.conftest import LATEST

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = 4096


def build(directory: Path, *, keys: int = 60, rounds: int = 9) -> Path:
    """A store with small, large and overflowing values, branch pages, a free list, removals."""
    generator = random.Random(11)
    store = Store.open(LmdbBackend(directory))
    for number in range(1, rounds + 1):
        store.apply_group(number, [
            (b"key-%04d" % generator.randrange(keys * 5), pack_timestamp(number),
             plain_record(generator.randbytes(generator.choice([5, 300, 1_000, 3_000, 9_000]))))
            for _ in range(keys)], rows=[(b"row-%d" % (number % 4), b"%d" % number)])
        store.flush_now()
    Compactor(store, lambda: 4, retention_ms=1).run_pass()
    store.close()
    return directory / "gen-00000001.mdb"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("sound")).read_bytes()


@pytest.fixture
def image(sound: bytes) -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, len(sound)) as image:
        image[:] = sound
        yield image


def passes(image: mmap.mmap) -> bool:
    try:
        audit_image(image, newest_meta(image))
    except StoreCorrupt:
        return False
    return True


def page_flags(image: mmap.mmap, number: int) -> int:
    return int(fmt.PAGE_HEADER.unpack_from(image, number * PAGE)[2])


@pytest.mark.parametrize("rounds", [0, 1, 2, 40])
def test_sound_files_of_any_age_pass(tmp_path: Path, rounds: int) -> None:
    path = build(tmp_path, rounds=rounds)
    result = audit_file(path)
    backend = LmdbBackend(tmp_path)
    assert result.entries == sum(backend.stats().entries.values())
    backend.close()


def test_a_large_sound_file_with_every_kind_of_page_passes(tmp_path: Path) -> None:
    path = build(tmp_path, keys=1_500, rounds=4)
    image = path.read_bytes()
    flags = {image[number * PAGE + 10] for number in range(len(image) // PAGE)}
    assert flags >= {fmt.PAGE_BRANCH, fmt.PAGE_LEAF, fmt.PAGE_OVERFLOW, fmt.PAGE_META}
    assert audit_file(path).entries > 4_000


def test_a_file_that_ends_before_its_last_page_passes_if_the_rest_is_free(tmp_path: Path) -> None:
    """A commit that removes much needs new pages on the way, and writes none that it gives back. A
    step of compaction leaves such a file now and then, these removals always do."""
    keys = [b"%03d" % number + bytes(400) for number in range(400)]
    backend = LmdbBackend(tmp_path)
    backend.write(WriteBatch(puts={Table.MVCC: [(key, bytes(300)) for key in keys]}))
    random.Random(1).shuffle(keys)
    backend.write(WriteBatch(deletes={Table.MVCC: keys[20:]}))
    backend.close()
    path = tmp_path / "gen-00000001.mdb"
    content = path.read_bytes()
    last_page = newest_meta(content).last_page
    assert len(content) < (last_page + 1) * PAGE
    assert audit_file(path).pages == last_page - 1
    # Of a file that was cut short nothing passes but what is whole.
    for size in range(len(content) - PAGE, 0, -PAGE):
        path.write_bytes(content[:size])
        with contextlib.suppress(StoreCorrupt):
            assert audit_file(path).entries == 20
    path.write_bytes(content)
    backend = LmdbBackend(tmp_path)
    assert dict(backend.view().iterate(Table.MVCC)) == {key: bytes(300) for key in keys[:20]}
    backend.write(WriteBatch(puts={Table.MVCC: [(key, bytes(300)) for key in sorted(keys)]}))
    backend.close()
    assert audit_file(path).entries == 400


def test_every_bit_of_the_newer_meta_page_matters_or_is_unused(image: mmap.mmap) -> None:
    """Refused, except for the fields that LMDB does not use when it opens a file."""
    newest = newest_meta(image).transaction % 2 * PAGE
    unused = {*range(8, 10), *range(12, 16), *range(24, 40)}
    accepted = set()
    for offset in range(fmt.META_BYTES):
        for bit in range(8):
            image[newest + offset] ^= 1 << bit
            if passes(image):
                accepted.add(offset)
            image[newest + offset] ^= 1 << bit
    assert accepted <= unused


def test_the_older_state_never_passes_for_the_newest(image: mmap.mmap) -> None:
    """Any change of either transaction number is refused, though both states are complete."""
    for meta_page in (0, PAGE):
        offset = meta_page + fmt.META_BYTES - 8
        (transaction,) = struct.unpack_from("=Q", image, offset)
        for other in {0, *range(max(transaction - 6, 0), transaction + 7), 2 * transaction,
                      *(transaction ^ 1 << bit for bit in range(64))} - {transaction}:
            struct.pack_into("=Q", image, offset, other)
            assert not passes(image), other
        struct.pack_into("=Q", image, offset, transaction)
    assert passes(image)


def test_live_page_headers_matter(image: mmap.mmap) -> None:
    """Headers of pages that the audit reaches: number, flags, bounds. (The pad is not used.)"""
    checked = 0
    for number in range(2, len(image) // PAGE):
        if number % 15:
            continue
        accepted = set()
        for offset in range(fmt.PAGE_HEADER_BYTES):
            for bit in (0, 3):
                image[number * PAGE + offset] ^= 1 << bit
                if passes(image):
                    accepted.add(offset)
                image[number * PAGE + offset] ^= 1 << bit
        if len(accepted) < fmt.PAGE_HEADER_BYTES:
            checked += 1
            # A larger count of overflow pages stays harmless while they are free.
            slack = {*range(12, 16)} if page_flags(image, number) == fmt.PAGE_OVERFLOW else set()
            assert accepted <= {8, 9} | slack, number
    assert checked > 10


def offsets_of(image: mmap.mmap, number: int) -> list[int]:
    lower = fmt.PAGE_HEADER.unpack_from(image, number * PAGE)[3]
    count = (lower - fmt.PAGE_HEADER_BYTES) // 2
    return list(struct.unpack_from(f"={count}H", image, number * PAGE + fmt.PAGE_HEADER_BYTES))


def live_branch(image: mmap.mmap) -> int:
    """The root of the versions: the branch page with the most children that the audit needs."""
    branches = [number for number in range(2, len(image) // PAGE)
                if page_flags(image, number) == fmt.PAGE_BRANCH]
    for number in sorted(branches, key=lambda n: len(offsets_of(image, n)), reverse=True):
        image[number * PAGE] ^= 0xFF
        needed = not passes(image)
        image[number * PAGE] ^= 0xFF
        if needed:
            return number
    raise AssertionError("the file has no live branch page")


def swap_children(image: mmap.mmap) -> None:
    number = live_branch(image)
    one, two = offsets_of(image, number)[1:3]
    start = number * PAGE
    first, second = image[start + one:start + one + 6], image[start + two:start + two + 6]
    image[start + one:start + one + 6], image[start + two:start + two + 6] = second, first


def same_child_twice(image: mmap.mmap) -> None:
    number = live_branch(image)
    one, two = offsets_of(image, number)[1:3]
    start = number * PAGE
    image[start + two:start + two + 6] = image[start + one:start + one + 6]


def raise_separator(image: mmap.mmap) -> None:
    """A separator that is still in order among its neighbours, but above keys of its child."""
    number = live_branch(image)
    offset = number * PAGE + offsets_of(image, number)[1]
    key_bytes = fmt.NODE_HEADER.unpack_from(image, offset)[3]
    last = offset + fmt.NODE_HEADER_BYTES + key_bytes - 1
    image[last - 2] = 0xFF  # the last byte of the milliseconds, inverted


def swap_leaf_order(image: mmap.mmap) -> None:
    for number in range(2, len(image) // PAGE):
        if page_flags(image, number) == fmt.PAGE_LEAF and len(offsets_of(image, number)) > 2:
            start = number * PAGE + fmt.PAGE_HEADER_BYTES
            image[start:start + 2], image[start + 2:start + 4] = (
                image[start + 2:start + 4], image[start:start + 2])


def cut_file(image: mmap.mmap) -> None:
    image.resize(len(image) - 8 * PAGE)


def zero_page(image: mmap.mmap) -> None:
    number = live_branch(image)
    image[number * PAGE:(number + 1) * PAGE] = bytes(PAGE)


@pytest.mark.parametrize("damage", [swap_children, same_child_twice, raise_separator,
                                    swap_leaf_order, cut_file, zero_page])
def test_structural_damage_is_refused(image: mmap.mmap,
                                      damage: Callable[[mmap.mmap], None]) -> None:
    damage(image)
    assert not passes(image)


def test_a_live_page_in_the_free_list_is_refused(image: mmap.mmap) -> None:
    """LMDB would overwrite the page later, without any error."""
    meta = newest_meta(image)
    start = meta.free.root * PAGE
    live = live_branch(image)
    offset = offsets_of(image, meta.free.root)[-1]
    data = start + offset + fmt.NODE_HEADER_BYTES + 8
    count = struct.unpack_from("=Q", image, data)[0]
    assert count >= 1
    struct.pack_into("=Q", image, data + 8, live)
    assert not passes(image)


def test_a_free_list_entry_of_no_bytes_is_refused(image: mmap.mmap) -> None:
    """On a page that is packed as it should be."""
    number = newest_meta(image).free.root
    page = bytes(image[number * PAGE:(number + 1) * PAGE])
    content = b""
    slots: list[int] = []
    for offset in offsets_of(image, number):
        low, high, flags, key_bytes = fmt.NODE_HEADER.unpack_from(page, offset)
        assert (flags, key_bytes) == (0, 8)
        size = low | high << 16 if slots else 0
        node = fmt.NODE_HEADER.pack(size & 0xFFFF, size >> 16, 0, 8) + page[
            offset + fmt.NODE_HEADER_BYTES:offset + fmt.NODE_HEADER_BYTES + 8 + size]
        content = node + content
        slots.append(PAGE - len(content))
    assert slots
    head = page[:14] + struct.pack("=H", slots[-1]) + struct.pack(f"={len(slots)}H", *slots)
    image[number * PAGE:(number + 1) * PAGE] = head.ljust(slots[-1], b"\0") + content
    assert newest_meta(image).free.root == number
    assert not passes(image)


def test_a_stale_page_is_refused(tmp_path: Path) -> None:
    """An older copy of a page has checksums that fit; only the totals tell."""
    backend = LmdbBackend(tmp_path)
    path = tmp_path / "gen-00000001.mdb"
    pages: list[dict[bytes, bytes]] = []
    for number in (b"1", b"2"):
        backend.write(WriteBatch(puts={Table.ROWS: [(b"row", b"value " + number)]}))
        image = path.read_bytes()
        pages.append({image[at + 16:at + PAGE]: image[at:at + PAGE]
                      for at in range(2 * PAGE, len(image), PAGE)
                      if b"value " + number in image[at:at + PAGE]})
    backend.close()
    (old,), (new,) = (list(found.values()) for found in pages)
    image = path.read_bytes()
    at = image.index(new)
    path.write_bytes(image[:at + 16] + old[16:] + image[at + PAGE:])
    with pytest.raises(StoreCorrupt, match="totals"):
        audit_file(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\x00" * 3 * PAGE, b"text" * 5_000],
                         ids=["empty", "short", "zeros", "text"])
def test_files_that_are_no_store(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(StoreCorrupt):
        audit_file(path)


# Opens damaged files that the audit lets pass, through LMDB and in a process of its own, because a
# page that LMDB cannot take would end the process.
READER = """
    import random, sys
    from pathlib import Path
    from elastickv.errors import CorruptionError
    from elastickv.store.lmdb_backend import LmdbBackend
    from elastickv.store.mvcc_store import Store
    from elastickv.store.values import plain_record

    path = Path(sys.argv[1]) / "gen-00000001.mdb"
    sound = path.read_bytes()

    def state(write=False):
        store = Store.open(LmdbBackend(path.parent))
        try:
            if write:
                store.apply_group(store.applied_index + 1, [
                    (b"new-%d" % n, 1 << 40, plain_record(bytes(1000))) for n in range(50)])
                store.flush_now()
            keys = [key for key, _ in store.scan(b"", b"", 10**6, 1 << 62, 1)]
            assert all(store.get(key, 1 << 62, 1) for key in keys)
            return (store.applied_index, store.scan(b"", b"", 10**6, 1 << 62, 1), store.rows(),
                    store.scan(b"", b"", 10**6, 1 << 62, 1, True))
        finally:
            store.close()

    expected = state(), state(write=True)
    generator = random.Random(int(sys.argv[2]))
    refused = right = 0
    for _ in range(int(sys.argv[3])):
        image = bytearray(sound)
        image[generator.randrange(len(image))] ^= 1 << generator.randrange(8)
        path.write_bytes(image)
        try:
            found = state(), state(write=True)
        except CorruptionError:
            refused += 1
            continue
        assert found == expected
        right += 1
    print(refused, right)
"""


def test_random_flips_are_refused_or_read_right(tmp_path: Path) -> None:
    """Whatever bit flips: a typed refusal, or every read and later write is right."""
    build(tmp_path, keys=25, rounds=6)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), str(tmp_path), "5", "150"], cwd=REPOSITORY,
        text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    refused, right = map(int, done.stdout.split())
    assert refused > 30
    assert right > 30


def damage_values(path: Path) -> None:
    """Flip a bit in every large value, live or not."""
    content = bytearray(path.read_bytes())
    for start in range(2 * PAGE, len(content), PAGE):
        if content[start + 10] == fmt.PAGE_OVERFLOW:
            content[start + 1_000] ^= 1
    path.write_bytes(content)


def test_a_large_store_is_audited_beside_the_node(tmp_path: Path) -> None:
    path = build(tmp_path)
    backend = LmdbBackend(tmp_path, inline_audit_bytes=0)
    store = Store.open(backend)
    # The audited state stays readable for the child while newer ones replace it.
    for index in range(store.applied_index + 1, store.applied_index + 6):
        store.apply_group(index, [(b"key-%04d" % index, 1 << 40, plain_record(bytes(3_000)))])
        store.flush_now()
    while backend.poll_audit():
        pass
    store.close()
    assert audit_file(path).entries > 100


def test_damage_in_a_large_store_is_reported(tmp_path: Path) -> None:
    damage_values(build(tmp_path))
    backend = LmdbBackend(tmp_path, inline_audit_bytes=0)

    def poll() -> None:
        while backend.poll_audit():
            pass

    with pytest.raises(StoreCorrupt, match="audit"):
        poll()
    backend.close()


ENDLESS_AUDIT = """#!{python}
import signal, sys
import lmdb
with lmdb.open(sys.argv[3], subdir=False, readonly=True, max_dbs=8).begin():
    print("pinned", flush=True)
    signal.pause()
"""


def test_a_killed_audit_pins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that a dead child's transaction would hold are free for reuse again."""
    build(tmp_path)
    endless = tmp_path / "endless"
    endless.write_text(ENDLESS_AUDIT.format(python=sys.executable))
    endless.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(endless))
    backend = LmdbBackend(tmp_path, inline_audit_bytes=0)
    audit = backend._audit
    assert audit is not None
    assert backend.poll_audit()
    audit._process.kill()
    audit._process.wait()
    assert not backend.poll_audit()
    assert backend._environment.env.reader_check() == 0
    backend.close()


@pytest.mark.parametrize(("kind", "is_damage"), [
    (signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, False),
    (signal.SIGBUS, True), (signal.SIGSEGV, True)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "")
def test_only_a_fault_of_the_file_ends_an_audit_as_damage(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals,
        is_damage: bool) -> None:
    build(tmp_path)
    endless = tmp_path / "endless"
    endless.write_text(ENDLESS_AUDIT.format(python=sys.executable).replace(
        "import lmdb", "signal.signal(signal.SIGINT, signal.SIG_DFL)\nimport lmdb"))
    endless.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(endless))
    backend = LmdbBackend(tmp_path, inline_audit_bytes=0)
    audit = backend._audit
    assert audit is not None
    assert os.getpgid(audit._process.pid) != os.getpgid(0)  # Ctrl-C does not reach it
    audit._process.send_signal(kind)
    audit._process.wait()
    if is_damage:
        with pytest.raises(StoreCorrupt, match="found damage"):
            backend.poll_audit()
    else:
        assert not backend.poll_audit()
    backend.close()


def test_an_audit_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(failing))
    backend = LmdbBackend(tmp_path, inline_audit_bytes=0)
    assert not backend.poll_audit()
    backend.close()


def test_an_audit_process_finds_a_lock_file_with_blocks(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk LMDB would die of a signal where it makes one, which looks like damage."""
    path = build(tmp_path)
    lock_file_of(path).unlink()
    said = tmp_path / "said"
    watching = tmp_path / "watching"
    watching.write_text(f"#!/bin/sh\nwc -c < {lock_file_of(path)} > {said}\nexit 1\n")
    watching.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(watching))
    BackgroundAudit(path).stop()
    assert int(said.read_text()) == LOCK_FILE_BYTES


def failing_reads(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """All reads of the file but the first `after` fail."""
    real, count = os.pread, itertools.count()

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if next(count) >= after:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, size, offset)

    monkeypatch.setattr("elastickv.store.audit.os.pread", pread)


@pytest.mark.parametrize("after", [0, 2, 20])
def test_a_disk_that_fails_an_audit_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capfd: pytest.CaptureFixture[str],
                                                 after: int) -> None:
    path = build(tmp_path)
    failing_reads(monkeypatch, after)
    with pytest.raises(OSError, match="Input/output"):
        LmdbBackend(tmp_path)
    failing_reads(monkeypatch, after)
    assert main(path) == ExitCode.DISK_FAILED
    assert capfd.readouterr().out.endswith("OSError: [Errno 5] Input/output error\n")


@pytest.mark.parametrize("says", ["", "echo pinned\n"], ids=["at once", "later"])
def test_a_disk_that_fails_an_audit_beside_the_node_is_no_damage(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    build(tmp_path)
    failing = tmp_path / "failing"
    failing.write_text(f"#!/bin/sh\n{says}exit 10\n")
    failing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(failing))

    def audit() -> None:
        backend = LmdbBackend(tmp_path, inline_audit_bytes=0)
        try:
            while backend.poll_audit():
                pass
        finally:
            backend.close()

    with pytest.raises(OSError, match=r"Input/output.*gen-00000001\.mdb"):
        audit()


def test_a_file_that_is_cut_during_its_audit_is_damage(tmp_path: Path) -> None:
    """Through a map the missing pages would be a signal."""
    path = build(tmp_path)
    with pytest.raises(StoreCorrupt):
        audit_file(path, on_meta=lambda: os.truncate(path, 2 * PAGE))


def test_closing_ends_the_audit(tmp_path: Path) -> None:
    build(tmp_path)
    backend = LmdbBackend(tmp_path, inline_audit_bytes=0)
    backend.close()
    assert not backend.poll_audit()
    LmdbBackend(tmp_path).close()


def test_damage_at_the_start_of_an_audit_is_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"no store")
    with pytest.raises(StoreCorrupt, match="found damage"):
        BackgroundAudit(path)


@pytest.mark.parametrize(("damaged", "status", "output"), [
    (False, 0, "pinned\nok\n"), (True, 5, "pinned\nthe store's file is damaged")])
def test_the_audit_process(tmp_path: Path, capfd: pytest.CaptureFixture[str], damaged: bool,
                           status: int, output: str) -> None:
    path = build(tmp_path)
    if damaged:
        damage_values(path)
    assert main(path) == status
    assert capfd.readouterr().out.startswith(output)


def test_reads_of_a_page_damaged_while_open_are_refused(tmp_path: Path) -> None:
    """Damage after the audit: the value's own checksum answers."""
    path = build(tmp_path)
    store = Store.open(LmdbBackend(tmp_path))
    damage_values(path)
    with pytest.raises(StoreCorrupt):
        store.scan(b"", b"", 10_000, LATEST, 0)
    store.close()
