"""What must hold in every run, checked as it happens. The first breach ends the run.

* One leader per term, and every leader holds every entry that was committed in an earlier term
  (leader completeness). A candidate of a term that is over may still win it, and lead nobody.
* Log matching: an index and a term name one entry, with one predecessor, on every node for ever.
* A committed entry is durable on a majority, at the moment it is committed. A leader counts of a
  member only what that member has on its disk, and commits by counting only in its own term.
* What one node saw committed is never another entry anywhere, and is never truncated.
* Every node applies the committed entries in order, each once in a process; the applied index does
  not go back, nor below what was durable when a process starts again. What is applied is durable in
  the log, and the log is dropped only up to what is durable in the state.
* A truncation is durable before anything follows it.
* Commit timestamps rise along the log.
* The same entry has the same effects on every node: versions, rows, meta, and the sidecar apart
  from `created` and `local_epoch`. A node that starts, or installed a snapshot, holds exactly the
  sum of the effects up to its applied index.
* No nonce is used twice under a DEK, restarts and restored disks included, and none under an epoch
  that is not registered by a committed entry.
* A value that was given to a node after its storage cutover is in no byte that reaches a disk.
* A node halts or refuses to start only when a fault was injected that explains it.

What is checked of messages is in `promises.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any
from zlib import crc32

from elastickv.errors import DiskFull
from elastickv.keys.registry import WRITERS_PREFIX, decode_row_key, decode_row_value
from elastickv.keys.sidecar import Sidecar
from elastickv.kv.fsm import META_SIDECAR
from elastickv.raft.engine import Entry
from elastickv.raft.journal import Journal
from elastickv.raft.membership import CONFIGURATION_KIND
from elastickv.store.mvcc import encode_store_key
from elastickv.store.mvcc_store import RESERVED_META, Store
from elastickv.store.tables import Table
from tests.sim.loop import Life, SimLoop
from tests.sim.promises import Promises, is_majority, voters_of
from tests.sim.trace import Trace

if TYPE_CHECKING:
    from tests.sim.cluster import SimNode

SECRET = b"SECRET"
"""Begins every value that may reach no disk in the clear."""

DATA_LOSS = frozenset(("old-disk", "bit-flip"))
"""Faults after which a node may hold less than it acknowledged."""

NODE_SPECIFIC = frozenset((META_SIDECAR, *RESERVED_META))
"""Meta entries that are not the same on every node."""


class Violation(BaseException):
    """An invariant does not hold. The message names it and the evidence.

    No `Exception`: the code under test must not catch it.
    """


@dataclass(slots=True)
class Effect:
    """What one entry did to the state."""

    writes: dict[bytes, bytes] = field(default_factory=dict)
    rows: dict[bytes, bytes] = field(default_factory=dict)
    meta: dict[bytes, bytes] = field(default_factory=dict)


def sidecar_facts(sidecar: Sidecar) -> object:
    """A sidecar without what differs between nodes."""
    return (sidecar.storage_envelope_active,
            sidecar.storage_envelope_cutover_index, sidecar.raft_envelope_cutover_index,
            sidecar.active_storage, sidecar.active_raft,
            tuple(sorted((dek_id, key.purpose, key.wrapped)
                         for dek_id, key in sidecar.keys.items())))


class Oracle:
    """Sees everything, remembers what was promised."""

    def __init__(self, loop: SimLoop, trace: Trace) -> None:
        self._loop = loop
        self._trace = trace
        self.nodes: dict[str, SimNode] = {}
        self._leaders: dict[int, str] = {}
        self._entries: dict[tuple[int, int], tuple[int, int]] = {}
        self._committed: dict[int, tuple[int, int]] = {}
        self._committed_in: dict[int, int] = {}
        # The term of the member by which an entry was first seen committed.
        self._committed_first_in: dict[int, int] = {}
        self._configurations: set[tuple[int, int]] = set()
        self._committed_configurations = {0}
        self.last_committed = 0
        self._effects: dict[int, Effect] = {}
        self._sidecars: dict[int, object] = {}
        self._nonces: set[tuple[int, bytes]] = set()
        self._registered: dict[tuple[int, int], int] = {}
        self._last_ts = 0
        self.promises = Promises(self)

    def fail(self, invariant: str, evidence: str) -> None:
        """Record the first breach and raise it."""
        violation = Violation(f"{invariant}: {evidence} (at {self._loop.now:.4f} s)")
        self._trace.add("violation", violation)
        self._loop.failure = self._loop.failure or violation
        raise violation

    def _name(self) -> str:
        return self._loop.life.name if self._loop.life is not None else "?"

    # --- log ------------------------------------------------------------------------------------

    def appended(self, journal: Journal, index: int, term: int, previous_term: int,
                 command: bytes) -> None:
        self._trace.count("entries")
        if command[:1] == CONFIGURATION_KIND:
            self._configurations.add((index, term))
        self._match(index, term, previous_term, crc32(command))

    def _match(self, index: int, term: int, previous_term: int, checksum: int) -> None:
        known = self._entries.setdefault((index, term), (checksum, previous_term))
        if known != (checksum, previous_term):
            self.fail("log matching", f"{self._name()} holds another entry {index} of term {term}")

    def opened(self, journal: Journal) -> None:
        """A log was read from a disk: what it holds must be what was once written, and stay."""
        files: list[Any] = [segment.file for segment in journal._segments]
        if not all(file.is_durable for file in files):
            self.fail("what a start believes is durable",
                      f"{self._name()} counts entries that a power cut would take")
        previous_term = journal.anchor_term
        for index in range(journal.anchor_index + 1, journal.last_index + 1):
            command, _, term = journal.entry(index)
            known = self._entries.get((index, term))
            if known != (crc32(command), previous_term):
                self.fail("log matching", f"{self._name()} read an entry {index} of term {term} "
                                          "that was never written")
            previous_term = term

    def truncating(self, journal: Journal, index: int) -> None:
        """A leader of a term before that in which the entry was committed may have it dropped, by a
        message that was under way for long: this node's copy was none of those that counted."""
        self._trace.count("truncations")
        term = self.nodes[self._name()].core.term()
        for dropped in range(index, journal.last_index + 1):
            committed = self._committed.get(dropped)
            if committed is not None and committed[0] == journal.term_at(dropped) \
                    and term >= self._committed_first_in[dropped]:
                self.fail("committed entries stay", f"{self._name()} truncates entry {dropped}")

    def truncated(self, journal: Journal) -> None:
        file: Any = journal._segments[-1].file
        if not file.is_durable:
            self.fail("truncations are durable", f"{self._name()} goes on before its log is cut")

    def cutting_tail(self) -> None:
        self._trace.count("torn tails cut")

    def compacting(self, index: int) -> None:
        node = self.nodes[self._name()]
        if index > node.store.durable_index:
            self.fail("the log is kept until the state is durable",
                      f"{node.name} drops entries up to {index}, its state is durable up to "
                      f"{node.store.durable_index}")

    # --- after every step -----------------------------------------------------------------------

    def after_step(self, life: Life) -> None:
        """The life ran one callback."""
        node = self.nodes[life.name]
        core = node.core
        if core is None or node.life is not life:
            return
        commit_index = core.commit_index()
        if commit_index != node.seen_commit:
            self._commit_moved(node, commit_index)
        term, leading = core.term(), core.is_leading()
        if (term, leading) != node.seen_role:
            self._role_moved(node, term, leading)

    def counted(self, leader: SimNode, name: str) -> None:
        """What a leader counts of a member is on that member's disk."""
        peer, term, index = self.nodes[name], leader.core.term(), leader.core.match_index(name)
        # A member in a later term may have replaced what it acknowledged in this one.
        if index < leader.journal.anchor_index or peer.seen_role[0] > term \
                or _may_have_lost_data(peer) or _may_have_lost_data(leader):
            return
        if not _is_durable(peer, index, leader.journal.term_at(index)):
            self.fail("leaders count what is durable",
                      f"{leader.name} counts entry {index} of {name} in term {term}, durable "
                      f"there up to {peer.journal.durable_index}")

    def _role_moved(self, node: SimNode, term: int, leading: bool) -> None:
        if term < node.seen_role[0]:
            self.fail("terms rise", f"{node.name} went from term {node.seen_role[0]} to {term}")
        node.seen_role = (term, leading)
        self._trace.add("role", node.name, term, leading)
        if not leading:
            return
        self._trace.count("elections")
        self.promises.elected(node, term)
        if self._leaders.setdefault(term, node.name) != node.name:
            self.fail("one leader per term",
                      f"{node.name} and {self._leaders[term]} lead in term {term}")
        journal = node.journal
        index = max((last for before, last in self._committed_in.items() if before < term),
                    default=0)
        if index > journal.anchor_index and (
                index > journal.last_index
                or journal.term_at(index) != self._committed[index][0]):
            self.fail("leader completeness",
                      f"{node.name} leads in term {term} without the committed entry {index}")

    def _commit_moved(self, node: SimNode, commit_index: int) -> None:
        if commit_index < node.seen_commit:
            self.fail("commit rises", f"{node.name} went from {node.seen_commit} to {commit_index}")
        journal = node.journal
        if node.seen_role == (node.core.term(), True) \
                and journal.term_at(commit_index) != node.core.term():
            self.fail("leaders commit entries of their own term",
                      f"{node.name} commits entry {commit_index} of term "
                      f"{journal.term_at(commit_index)} in term {node.core.term()}")
        first = max(node.seen_commit, journal.anchor_index) + 1
        node.seen_commit = commit_index
        for index in range(first, commit_index + 1):
            self._commit(node.name, index, journal.term_at(index))

    def _commit(self, name: str, index: int, term: int) -> None:
        entry = (term, self._entries[(index, term)][0])
        if index not in self._committed:
            self._require_majority(name, index, term)
            self._committed_in[self.nodes[name].core.term()] = index
            self._committed_first_in[index] = self.nodes[name].core.term()
        if self._committed.setdefault(index, entry) != entry:
            self.fail("committed entries stay",
                      f"{name} commits entry {index} of term {term}, another node one of term "
                      f"{self._committed[index][0]}")
        if (index, term) in self._configurations:
            self._committed_configurations.add(index)
        self.last_committed = max(self.last_committed, index)

    def _require_majority(self, name: str, index: int, term: int) -> None:
        """An entry is committed only once a majority could lose its power and still have it. Who
        may have lost data may have had it."""
        holders = {node.name for node in self.nodes.values()
                   if _may_have_lost_data(node)
                   or (node.has_booted and _is_durable(node, index, term))}
        if not is_majority(holders, voters_of(self.nodes[name])):
            self.fail("commitment is durable", f"{name} commits entry {index} of term {term}, "
                                               f"durable on {sorted(holders)} only")

    # --- apply ----------------------------------------------------------------------------------

    def applying(self, node: SimNode, entries: Sequence[Entry]) -> None:
        """The engine passes `entries` to a node's state machine."""
        expected = max(node.store.applied_index, 1) + 1
        for entry in entries:
            if entry.index != expected:
                self.fail("each entry is applied once, in order",
                          f"{node.name} applies entry {entry.index}, the next is {expected}")
            self._commit(node.name, entry.index, entry.term)
            expected += 1
        if entries[-1].index > node.journal.durable_index:
            self.fail("what is applied is durable",
                      f"{node.name} applies entry {entries[-1].index}, its log is durable up to "
                      f"{node.journal.durable_index}")

    def applied(self, node: SimNode, index: int, writes: Sequence[tuple[bytes, int, bytes]],
                rows: Sequence[tuple[bytes, bytes]], meta: dict[bytes, bytes]) -> None:
        """A node's store took the effects of one entry."""
        effect = Effect({encode_store_key(key, ts): record for key, ts, record in writes},
                        dict(rows),
                        {name: value for name, value in meta.items()
                         if name not in NODE_SPECIFIC})
        known = self._effects.setdefault(index, effect)
        if known is effect:
            self._note(index, writes, rows)
        elif known != effect:
            self.fail("replicas agree", f"entry {index} has other effects on {node.name}: "
                                        f"{effect} instead of {known}")
        sidecar = node.applier.sidecar
        if sidecar is not None:
            # A sidecar may be ahead of its store after a crash; its own index says what it knows.
            facts = sidecar_facts(sidecar)
            if self._sidecars.setdefault(sidecar.raft_applied_index, facts) != facts:
                self.fail("replicas agree", f"{node.name} has another sidecar at entry "
                                            f"{sidecar.raft_applied_index}")

    def _note(self, index: int, writes: Sequence[tuple[bytes, int, bytes]],
              rows: Sequence[tuple[bytes, bytes]]) -> None:
        """The first node to apply an entry did; it had applied all before it."""
        timestamps = [ts for _, ts, _ in writes]
        if timestamps and min(timestamps) <= self._last_ts:
            self.fail("commit timestamps rise", f"entry {index} writes at {min(timestamps)}, an "
                                                f"earlier one at {self._last_ts}")
        self._last_ts = max((self._last_ts, *timestamps))
        for key, value in rows:
            if key.startswith(WRITERS_PREFIX):
                self._registered[decode_row_key(key)] = decode_row_value(value).last_seen_epoch

    def check_configuration(self, node: SimNode) -> None:
        """What is in force at a node is the last committed configuration, or a later entry."""
        applied_index = node.store.applied_index
        index = node.engine._storage.membership.current.index
        last = max(i for i in self._committed_configurations if i <= applied_index)
        if index < last or (index <= applied_index and index != last):
            self.fail("configurations are committed or in the log",
                      f"{node.name} has applied {applied_index} and is ruled by configuration "
                      f"{index}; the last committed one is {last}")

    def check_whole_state(self, node: SimNode) -> None:
        """A node's flushed state is the sum of all effects up to its applied index."""
        store = node.store
        expected = Effect()
        for index in range(1, store.applied_index + 1):
            effect = self._effects.get(index)
            if effect is not None:
                expected.writes.update(effect.writes)
                expected.rows.update(effect.rows)
                expected.meta.update(effect.meta)
        found = flushed_state(store)
        if (found.writes, found.rows, found.meta) != (expected.writes, expected.rows,
                                                      expected.meta):
            self.fail("state is the sum of the log",
                      f"{node.name} at entry {store.applied_index}: {_difference(found, expected)}")

    def restarted(self, node: SimNode) -> None:
        """A node opened its store."""
        if node.store.applied_index < node.durable_applied and "old-disk" not in node.excuses:
            self.fail("applied state is durable",
                      f"{node.name} starts at entry {node.store.applied_index}, "
                      f"{node.durable_applied} was durable")
        node.durable_applied = node.store.applied_index
        self.check_whole_state(node)

    # --- secrets --------------------------------------------------------------------------------

    def sealed(self, purpose: str, key_id: int, nonce: bytes) -> None:
        """Something is about to be sealed under a DEK for `purpose`."""
        self._trace.count(f"sealed: {purpose}")
        if (key_id, nonce) in self._nonces:
            self.fail("no nonce twice", f"{self._name()} seals with {nonce.hex()} under {key_id}")
        node_id, epoch = int.from_bytes(nonce[:2], "big"), int.from_bytes(nonce[2:4], "big")
        if epoch > self._registered.get((key_id, node_id), -1):
            self.fail("writers are registered", f"{self._name()} seals with {nonce.hex()} under "
                                                f"{key_id}, an epoch that nobody committed")
        self._nonces.add((key_id, nonce))

    def written(self, name: str, path: str, data: bytes) -> None:
        """Bytes on their way to a disk."""
        if SECRET in data:
            self.fail("ciphertext at rest", f"{name} writes a plaintext value to {path}")

    # --- ends -----------------------------------------------------------------------------------

    def suspected(self, node: SimNode, fields: Mapping[str, object]) -> None:
        """A node takes itself for one with an old disk."""
        if not _may_have_lost_data(node):
            self.fail("nodes suspect themselves for a reason",
                      f"{node.name} has lost nothing: {fields.get('reason')}")

    def halted(self, node: SimNode, error: BaseException, allowed: dict[str, tuple[str, ...]]
               ) -> None:
        """A node stopped itself or refused to start. A full disk explains neither the end of a node
        that serves, which has to wait for space, nor another error that it is behind."""
        name = type(error).__name__
        chain: list[Any] = [error]
        while not isinstance(chain[-1].__cause__, DiskFull | NoneType):
            chain.append(chain[-1].__cause__)
        names = {base.__name__ for link in chain for base in type(link).__mro__}
        if node.serving:
            names.discard(DiskFull.__name__)
        self._trace.add("halted", node.name, name, error)
        self._trace.count("halts")
        if not any(names & set(allowed[excuse]) for excuse in node.excuses):
            self.fail("nodes halt for a reason", f"{node.name} halts without one: {name}: {error} "
                                                 f"(injected: {sorted(node.excuses)})")


def _may_have_lost_data(node: SimNode) -> bool:
    return not node.excuses.isdisjoint(DATA_LOSS)


def _is_durable(node: SimNode, index: int, term: int) -> bool:
    journal: Journal = node.journal
    if index <= journal.anchor_index:
        return True
    if len(journal) == 0:
        # Also while a snapshot replaces the log: what the node holds then is its state.
        return bool(index <= node.store.durable_index)
    return index <= journal.durable_index and journal.term_at(index) == term


def flushed_state(store: Store) -> Effect:
    """Everything in a store that has nothing left to flush, as the backend holds it."""
    view = store.backend.view()
    try:
        return Effect(
            dict(view.iterate(Table.MVCC)), dict(view.iterate(Table.ROWS)),
            {name: value for name, value in view.iterate(Table.META)
             if name not in NODE_SPECIFIC})
    finally:
        view.close()


def _difference(found: Effect, expected: Effect) -> str:
    parts = []
    for kind in ("writes", "rows", "meta"):
        have: dict[Any, bytes] = getattr(found, kind)
        want: dict[Any, bytes] = getattr(expected, kind)
        for key in sorted(set(have) | set(want)):
            if have.get(key) != want.get(key):
                parts.append(f"{kind} {key!r}: {have.get(key)!r} instead of {want.get(key)!r}")
    return "; ".join(parts[:3])
