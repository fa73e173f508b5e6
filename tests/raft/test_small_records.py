"""Hard state, peer memory, base configuration: durable, checked, never half believed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from elastickv.durable import OsDisk
from elastickv.errors import DiskFull, JournalCorrupt
from elastickv.raft.checked_file import encode_checked
from elastickv.raft.configuration_file import ConfigurationFile
from elastickv.raft.engine import Member, Suffrage
from elastickv.raft.frames import PeerRecord
from elastickv.raft.hardstate import HardState, HardStateFile
from elastickv.raft.membership import Configuration
from elastickv.raft.peer_memory import PeerMemory, Position, missing_floor, what_was_lost
from elastickv.raft.replaced import NOTHING_REPLACED, LogEnd, ReplacedTail, replaced_tail

DISK = OsDisk()


def test_hard_state_is_remembered(tmp_path):
    path = tmp_path / "hardstate"
    state = HardStateFile(DISK, path)
    assert not state.existed
    assert state.begin_boot() == 1
    state.set_term(6, "n2")
    state.lost_data(7, "n1", 1)
    again = HardStateFile(DISK, path)
    assert again.existed
    assert (again.state.term, again.state.vote, again.state.suspect) == (7, "n1", True)
    assert again.begin_boot() == 2
    again.raise_boot(9)
    again.raise_boot(3)
    again.regained_data()
    again = HardStateFile(DISK, path)
    assert (again.state.boot_epoch, again.state.suspect) == (9, False)


@pytest.mark.parametrize(("make", "load"), [
    (lambda path: HardStateFile(DISK, path).begin_boot(), lambda path: HardStateFile(DISK, path)),
    (lambda path: _remember(path), lambda path: PeerMemory(DISK, path)),
    (lambda path: ConfigurationFile(DISK, path).save(CONFIGURATION),
     lambda path: ConfigurationFile(DISK, path).load())],
    ids=["hardstate", "peers", "members"])
@pytest.mark.parametrize("spoil", [
    lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"", lambda data: data[:5],
    lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data[:-1] + bytes([data[-1] ^ 8]),
    lambda data: bytes(len(data))],
    ids=["short", "long", "empty", "stub", "flip-first", "flip-last", "zeros"])
def test_damaged_record_refuses_the_start(tmp_path, make, load, spoil):
    path = tmp_path / "record"
    make(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(JournalCorrupt, match="damaged"):
        load(path)


CONFIGURATION = Configuration(12, (Member("n1", "h:1"), Member("n2", "h:2", Suffrage.LEARNER)))


def _remember(path: Path) -> None:
    memory = PeerMemory(DISK, path)
    memory.acknowledged("n2", 40, 3)
    memory.flush()


def test_base_configuration_is_remembered(tmp_path):
    file = ConfigurationFile(DISK, tmp_path / "members")
    assert file.load() is None
    file.save(CONFIGURATION)
    assert ConfigurationFile(DISK, tmp_path / "members").load() == CONFIGURATION


def test_peer_memory_keeps_the_highest_of_each(tmp_path):
    path = tmp_path / "peers"
    memory = PeerMemory(DISK, path)
    memory.booted("n2", 3, 99, 5)
    memory.spoke("n2", 7)
    memory.spoke("n2", 6)
    memory.acknowledged("n2", 40, 6)
    memory.acknowledged("n2", 39, 6)
    memory.acknowledged("n2", 50, 5)
    memory.sent("n2", 45, 7)
    memory.sent("n2", 44, 7)
    memory.flush()
    again = PeerMemory(DISK, path)
    assert again.of("n2") == PeerRecord(3, 99, 7, 40, 6, 45, 7)
    assert again.of("n3") is None
    again.forget("n2")
    again.flush()
    assert PeerMemory(DISK, path).of("n2") is None


def test_a_boot_that_could_not_be_written_is_not_remembered(tmp_path, monkeypatch):
    """The peer greets again then, and its boot has to look as new as the first time."""
    path = tmp_path / "peers"
    memory = PeerMemory(DISK, path)
    memory.booted("n2", 3, 99, 5)
    memory.acknowledged("n2", 7, 5)

    def full(self, path, data):
        raise DiskFull("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(OsDisk, "replace", full)
        with pytest.raises(DiskFull):
            memory.booted("n2", 4, 100, 6)
    assert (memory.of("n2").boot_epoch, memory.of("n2").boot_id) == (3, 99)
    memory.booted("n2", 4, 100, 6)
    found = PeerMemory(DISK, path).of("n2")
    assert (found.boot_epoch, found.boot_id, found.term, found.acked_index) == (4, 100, 6, 7)


def test_a_job_writes_what_was_remembered_when_it_was_given(tmp_path):
    path = tmp_path / "peers"
    memory = PeerMemory(DISK, path)
    assert memory.begin_flush() is None
    memory.acknowledged("n2", 7, 5)
    job = memory.begin_flush()
    memory.acknowledged("n2", 8, 5)
    assert PeerMemory(DISK, path).of("n2") is None
    job()
    assert PeerMemory(DISK, path).of("n2").acked_index == 7
    memory.begin_flush()()
    assert PeerMemory(DISK, path).of("n2").acked_index == 8
    assert memory.begin_flush() is None


@pytest.mark.parametrize("write", [lambda memory: memory.booted("n3", 1, 2, 3),
                                   lambda memory: memory.flush()], ids=["a boot", "a flush"])
def test_a_job_that_comes_late_writes_nothing_old(tmp_path, write):
    path = tmp_path / "peers"
    memory = PeerMemory(DISK, path)
    memory.acknowledged("n2", 7, 5)
    late = memory.begin_flush()
    memory.acknowledged("n2", 8, 5)
    write(memory)
    written = path.read_bytes()
    late()
    assert path.read_bytes() == written
    assert PeerMemory(DISK, path).of("n2").acked_index == 8


def test_what_a_job_could_not_write_is_written_by_the_next(tmp_path, monkeypatch):
    path = tmp_path / "peers"
    memory = PeerMemory(DISK, path)
    memory.acknowledged("n2", 7, 5)
    job = memory.begin_flush()

    def full(self, path, data):
        raise DiskFull("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(OsDisk, "replace", full)
        with pytest.raises(DiskFull):
            job()
    memory.begin_flush()()
    assert PeerMemory(DISK, path).of("n2").acked_index == 7


NOW = Position(boot_epoch=4, boot_id=44, term=7, last_index=40, last_term=6)
LOSSES = [
    ("same boot, all there", PeerRecord(4, 44, 7, 40, 6, 0, 0), False),
    ("an earlier boot", PeerRecord(3, 33, 7, 40, 6, 0, 0), False),
    ("a later boot was seen", PeerRecord(5, 55, 1, 0, 0, 0, 0), True),
    ("the same boot number, another boot", PeerRecord(4, 45, 1, 0, 0, 0, 0), True),
    ("spoke in a later term", PeerRecord(3, 33, 8, 0, 0, 0, 0), True),
    ("acknowledged a later entry of the term", PeerRecord(3, 33, 7, 41, 6, 0, 0), True),
    ("sent an entry of a later term", PeerRecord(3, 33, 7, 0, 0, 2, 8), True),
    ("sent a later entry of the term", PeerRecord(3, 33, 7, 0, 0, 41, 7), False),
    ("acknowledged an entry of a later term", PeerRecord(3, 33, 7, 2, 7, 0, 0), True),
    ("a later leader replaced what it acknowledged", PeerRecord(3, 33, 7, 90, 5, 0, 0), False),
]


@pytest.mark.parametrize(("remembered", "lost"), [case[1:] for case in LOSSES],
                         ids=[case[0] for case in LOSSES])
def test_lost_disk_is_recognised(remembered, lost):
    assert bool(what_was_lost(remembered, NOW)) is lost


@pytest.mark.parametrize(("sent", "floor"), [
    ((6, 40), None), ((5, 90), None), ((6, 41), (6, 41)), ((7, 2), (7, 2))])
def test_leader_that_lost_what_it_sent_gets_a_floor(sent, floor):
    assert missing_floor(PeerRecord(4, 44, 7, 0, 0, sent[1], sent[0]), NOW) == floor


class Log(NamedTuple):
    """A log by its terms; the first is that of the anchor."""

    anchor_index: int
    terms: tuple[int, ...]

    @property
    def last_index(self) -> int:
        return self.anchor_index + len(self.terms) - 1

    def term_at(self, index: int) -> int:
        return self.terms[index - self.anchor_index]

    def first_index_of_term(self, index: int) -> int:
        return self.anchor_index + self.terms.index(self.term_at(index))


OLD = Log(10, (1, 1, 2, 2, 4, 4, 4))
BEHIND_12 = ReplacedTail((2, 12), ((4, 14, 16), (2, 13, 13)))


@pytest.mark.parametrize(("log", "kept", "known", "durable", "replaced"), [
    (OLD, (2, 12), NOTHING_REPLACED, (4, 16), BEHIND_12),
    (OLD, (4, 15), NOTHING_REPLACED, (4, 16), ReplacedTail((4, 15), ((4, 16, 16),))),
    (OLD, (3, 15), NOTHING_REPLACED, (4, 16), ReplacedTail((3, 15), ((4, 14, 16),))),
    (OLD, (1, 5), NOTHING_REPLACED, (4, 16), ReplacedTail((1, 5), ((4, 14, 16), (2, 12, 13),
                                                                   (1, 11, 11)))),
    (OLD, (5, 30), NOTHING_REPLACED, (4, 16), NOTHING_REPLACED),
    (Log(10, (1, 1, 2, 5)), (1, 11), BEHIND_12, (2, 12),
     ReplacedTail((1, 11), ((5, 13, 13), (2, 12, 12), (4, 14, 16), (2, 13, 13)))),
    (Log(10, (1, 1, 2, 5)), (2, 12), BEHIND_12, (5, 13), ReplacedTail((2, 12), ((5, 13, 13),))),
], ids=["two terms", "half of a term", "a snapshot in the middle", "a snapshot before all",
        "a snapshot after all", "once more before what replaced it was durable",
        "once more after that"])
def test_what_a_leader_replaces_is_known_by_term_and_index(log, kept, known, durable, replaced):
    assert replaced_tail(log, LogEnd(*kept), known, LogEnd(*durable)) == replaced


@pytest.mark.parametrize(("end", "missing", "explained"), [
    ((2, 12), (2, 13), True), ((2, 12), (4, 16), True), ((3, 13), (4, 14), True),
    ((2, 12), (4, 17), False), ((2, 12), (4, 13), False), ((2, 12), (3, 14), False),
    ((2, 11), (4, 16), False)],
    ids=["the first", "the last", "after a shorter replacement", "one behind it", "one before it",
         "of another term", "what was kept is lost"])
def test_only_what_was_replaced_is_explained(end, missing, explained):
    assert BEHIND_12.explains(LogEnd(*end), LogEnd(*missing)) is explained
    own = Position(4, 44, 7, end[1], end[0], BEHIND_12)
    assert (not what_was_lost(PeerRecord(4, 44, 7, missing[1], missing[0], 0, 0), own)) is explained
    assert (missing_floor(PeerRecord(4, 44, 7, 0, 0, missing[1], missing[0]), own) is None) \
        is explained


def test_hard_state_remembers_what_was_replaced(tmp_path):
    """And reads a record that was written before there was such a thing."""
    path = tmp_path / "hardstate"
    old = msgspec.msgpack.encode([7, "n1", 3, True, 2, 9])
    DISK.replace(path, encode_checked(HardStateFile.KIND, old))
    state = HardStateFile(DISK, path)
    assert state.state == HardState(7, "n1", 3, True, 2, 9, NOTHING_REPLACED)
    state.set_replaced(BEHIND_12)
    assert HardStateFile(DISK, path).state.replaced == BEHIND_12
