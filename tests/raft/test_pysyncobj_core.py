"""The seams: what is replaced exists in the pinned library, and only there."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pysyncobj.syncobj as library
import pytest
from pysyncobj import SyncObj
from raft_lab import Lab, run

from elastickv.raft import pysyncobj_core, pysyncobj_seams
from elastickv.raft.pysyncobj_core import RaftCore
from elastickv.raft.pysyncobj_journal import JournalAdapter
from elastickv.raft.pysyncobj_seams import PeerNode

SOURCE = Path(library.__file__).read_text(encoding="utf-8")


def test_the_library_is_the_version_that_was_read():
    assert importlib.metadata.version("pysyncobj") == "0.3.17"


def test_every_replaced_method_exists_in_the_library():
    replaced = [name for name in vars(RaftCore) if name.startswith("_SyncObj__")]
    assert len(replaced) > 8
    assert [name for name in replaced if name not in vars(SyncObj)] == []


def test_every_used_private_field_exists_in_the_library():
    text = Path(pysyncobj_core.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r"_SyncObj__(\w+)", text))
    assert len(used) > 20
    assert {name for name in used if f"self.__{name}" not in SOURCE
            and f"def __{name}" not in SOURCE} == set()


def test_every_replaced_module_name_exists_in_the_library():
    text = Path(pysyncobj_seams.__file__).read_text(encoding="utf-8")
    names = re.findall(r"library\.(\w+) =", text)
    assert len(names) == 4
    for name in names:
        assert re.search(rf"\b{name}\b", SOURCE)


def test_the_library_asks_for_nothing_else_outside():
    """Time and chance come from the engine: no other clock or generator is called."""
    used = set(re.findall(r"\b(?:time|random)\.(\w+)\(", SOURCE))
    # random.random is in the replaced timeout; time.sleep only where the transport is not ready.
    assert used == {"sleep", "random"}


def test_order_of_peers_does_not_depend_on_the_process():
    assert hash(PeerNode("n1")) == 3950597356
    assert PeerNode("n1") == PeerNode("n1")
    assert PeerNode("n1") != PeerNode("n2")
    assert str(PeerNode("n1")) == "n1"


def test_members_whose_hashes_are_alike_are_told_apart(monkeypatch):
    monkeypatch.setattr("elastickv.raft.pysyncobj_seams.crc32", lambda data: 0)
    first, second = PeerNode("n1"), PeerNode("n2")
    assert first and second
    assert first != second
    assert {first: 1, second: 2} == {PeerNode("n2"): 2, PeerNode("n1"): 1}


@pytest.mark.parametrize(("name", "arguments"), [("clear", ()), ("deleteEntriesTo", (1,))])
def test_the_library_drops_nothing_below_the_end_of_the_log(name, arguments):
    async def scenario() -> None:
        node = await Lab(1).start()
        with pytest.raises(NotImplementedError):
            getattr(node.core._SyncObj__raftLog, name)(*arguments)

    run(scenario())


def test_the_library_counts_no_entries(monkeypatch):
    """It would read each from the disk, from the commit index on, in every tick."""
    read: list[object] = []
    get = JournalAdapter.__getitem__

    def counting(self: JournalAdapter, item: int | slice) -> object:
        if isinstance(item, slice):
            read.append(item)
        return get(self, item)

    async def scenario() -> None:
        lab = Lab(1)
        node = await lab.start()
        for number in range(200):
            await node.engine.propose(b"%d" % number, timeout_s=1)
        node.kill()
        node.state.entries.clear()
        monkeypatch.setattr(JournalAdapter, "__getitem__", counting)
        await node.start()
        await lab.until(lambda: len(node.state.payloads()) == 200)

    run(scenario())
    # A tick that wins the election appends its no-op, and may count that one.
    assert len(read) <= 1
