"""The durable log: segments of checksummed records, an index in memory, payloads on the disk.

Invariants:

* `durable_index` never covers an entry that a power cut can take; it is what acknowledgements,
  votes and the leader's own count wait for. A start makes durable what it has read before it
  counts it.
* A truncation is durable before anything is appended behind it, so a cut tail cannot come back
  behind newer entries.
* A torn tail, that is damage with nothing provably durable behind it, is cut. Any other damage is
  `JournalCorrupt`.
* The entry at `anchor_index`, just before the first record, is known by its term only; everything
  up to it is in the state machine.
* The segments in the directory follow one another without a gap, at every moment: what compaction
  has dropped goes oldest first, one file after the other. A crash may bring some of it back.
* A dropped segment becomes a spare, in whose file a later segment begins (`segment.py`), or it is
  deleted: when there are spares enough, and when it may hold what was in the log before
  `shed_clear_entries` or before the start. So those entries are in no file for longer than the
  log needs them.
* No segment that begins behind the entries in the clear holds any.
"""

from __future__ import annotations

import contextlib
import random
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from elastickv.durable import Disk
from elastickv.errors import JOIN_ANEW_REMEDY, DiskFull, JournalCorrupt
from elastickv.raft import records
from elastickv.raft.compaction import segments_to_drop
from elastickv.raft.membership import CONFIGURATION_KIND
from elastickv.raft.offload import InlineOffload, Offload
from elastickv.raft.segment import (
    HEADER_SIZE,
    INDEX_SUFFIX,
    LOG_SUFFIX,
    SPARE_SUFFIX,
    TEMPORARY_SUFFIX,
    Segment,
    SegmentHeader,
    segment_name,
)

LogEntry = tuple[bytes, int, int]
"""(command, index, term): the order in which PySyncObj keeps an entry."""

FIRST_ANCHOR_INDEX = 1
"""A new log begins behind index 1, PySyncObj's implicit no-op of term 0."""
MOST_SPARES = 2
"""Under load one is taken as often as one is given back, a little later."""


def _raise(error: BaseException) -> None:
    raise error


class Ticket(NamedTuple):
    """What an fsync that is under way will make durable."""

    generation: int
    index: int  # type: ignore[assignment]


class Journal:
    """An append-only log over a `Disk`. Not thread-safe, but a sync job may run in any thread."""

    def __init__(self, disk: Disk, directory: Path, *, segment_bytes: int = 64 << 20,
                 max_command_bytes: int = 16 << 20, cache_bytes: int = 16 << 20,
                 cleanup: Offload | None = None,
                 cleanup_failed: Callable[[BaseException], None] | None = None,
                 generator: random.Random | None = None) -> None:
        """Open or create. `cleanup` deletes what compaction drops (default: inline): a large file
        takes the file system tens of milliseconds. `cleanup_failed` is told why that could not be
        done (default: it is raised there). `generator` draws the salts (default: the system's,
        since nobody may know them). Raises `JournalCorrupt`."""
        self._disk = disk
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._max_command_bytes = max_command_bytes
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[int, LogEntry] = OrderedDict()
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._generation = 0
        self._syncing: Segment | None = None
        self._cleanup = cleanup or InlineOffload()
        self._generator = generator or random.SystemRandom()
        self._dropped: deque[Segment] = deque()
        self._spares: deque[Segment] = deque()
        self._deleting = False
        self._cleanup_failed = cleanup_failed or _raise
        self._closed = False
        self.anchor_index = FIRST_ANCHOR_INDEX
        self.anchor_term = 0
        self.last_index = FIRST_ANCHOR_INDEX
        self.last_term = 0
        disk.make_directory(directory)
        self._open()
        self.durable_index = self.last_index
        self._reusable_from = self.last_index + 1
        self._clear_until = 0

    # --- reading ---------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of records."""
        return self.last_index - self.anchor_index

    @property
    def total_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self._segments)

    def surplus_index(self, max_bytes: int) -> int:
        """The last index of the segments that would have to go for the rest to have at most
        `max_bytes`; the anchor's when none would."""
        size = 0
        for segment in reversed(self._segments):
            size += segment.size
            if size > max_bytes:
                return segment.last_index
        return self.anchor_index

    @property
    def clear_index(self) -> int:
        """The last index of the finished segments that begin in the clear; the anchor's when there
        are none."""
        begin_in_clear = bisect_right(self._starts, self._clear_until)
        return self._starts[min(begin_in_clear, len(self._starts) - 1)] - 1

    def _segment_of(self, index: int) -> Segment:
        return self._segments[bisect_right(self._starts, index) - 1]

    def term_at(self, index: int) -> int:
        """The term of `index`, the anchor included. Raises `IndexError` outside the log."""
        if index == self.last_index:
            return self.last_term
        if index == self.anchor_index:
            return self.anchor_term
        if not self.anchor_index < index < self.last_index:
            raise IndexError(index)
        runs = self._segment_of(index).runs
        return runs[bisect_right(runs, (index, 1 << 64)) - 1][1]

    def first_index_of_term(self, index: int) -> int:
        """The first index of the run of entries that have the term of `index`."""
        term = self.term_at(index)
        if index == self.anchor_index:
            return index
        position = bisect_right(self._starts, index) - 1
        runs = self._segments[position].runs
        at = bisect_right(runs, (index, 1 << 64)) - 1
        while at == 0 and position > 0 and self._segments[position - 1].last_term == term:
            position -= 1
            runs = self._segments[position].runs
            at = len(runs) - 1
        return runs[at][0]

    def entry(self, index: int) -> LogEntry:
        """One entry. Raises `IndexError` outside the log, `JournalCorrupt` on damage."""
        cached = self._cache.get(index)
        return cached if cached is not None else self.entries(index, index, 1)[0]

    def entries(self, low: int, high: int, max_bytes: int) -> list[LogEntry]:
        """Entries `low..high`, inclusive, up to about `max_bytes`, but at least one.

        Raises `IndexError` outside the log, `JournalCorrupt` on damage.
        """
        if not self.anchor_index < low <= high <= self.last_index:
            raise IndexError(low)
        found: list[LogEntry] = []
        size = 0
        index = low
        while index <= high:
            entry = self._cache.get(index)
            if entry is None:
                segment = self._segment_of(index)
                chunk = segment.read(index, high - index + 1, max(0, max_bytes - size))
                found.extend((record.command, record.index, record.term) for record in chunk)
                size += sum(len(record.command) + records.HEADER_BYTES for record in chunk)
                index += len(chunk)
            else:
                size += len(entry[0]) + records.HEADER_BYTES
                if found and size > max_bytes:
                    break
                found.append(entry)
                index += 1
            if size >= max_bytes:
                break
        return found

    def marked_indexes(self) -> list[int]:
        """Ascending indexes of the configurations."""
        return [index for segment in self._segments for index in segment.marked]

    # --- writing ---------------------------------------------------------------------------

    def append(self, index: int, term: int, command: bytes) -> None:
        """Write the next entry to the file; durable after a sync.

        Raises `InvalidArgument` over the size limit and `DiskFull`, both without effect.
        """
        if index != self.last_index + 1 or term < self.last_term:
            raise JournalCorrupt(f"entry {index} of term {term} cannot follow {self.last_index} "
                                 f"of term {self.last_term}")
        records.check_size(command, self._max_command_bytes)
        active = self._segments[-1]
        if active.size >= self._segment_bytes or active.first_index <= self._clear_until < index:
            active = self._roll()
        active.append(records.encode(index, term, command, self.durable_index, active.salt))
        active.note(index, term, len(command), command[:1] == CONFIGURATION_KIND)
        self.last_index = index
        self.last_term = term
        self._remember((command, index, term))

    def _remember(self, entry: LogEntry) -> None:
        self._cache[entry[1]] = entry
        self._cached_bytes += len(entry[0])
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped[0])

    def _roll(self) -> Segment:
        """Seal the active segment and start the next."""
        self._segments[-1].seal()
        if self._syncing is None:
            # Beside another fsync this one proves nothing of that one's file: the kernel reports an
            # error once, and perhaps to the other.
            self.durable_index = self.last_index
        return self._add(self._next_segment(self._header(self.last_index + 1, self.last_term)))

    def _header(self, first_index: int, previous_term: int) -> SegmentHeader:
        return SegmentHeader(first_index, previous_term, self._generator.getrandbits(32))

    def _next_segment(self, header: SegmentHeader) -> Segment:
        while self._spares:
            try:
                segment = Segment.create_over(self._disk, self._spares[0].spare_path, header)
            except FileNotFoundError:
                # Whoever needed its room deleted it.
                self._spares.popleft()
            else:
                self._spares.popleft()
                return segment
        return Segment.create(self._disk, self._directory, header)

    def _add(self, segment: Segment) -> Segment:
        self._segments.append(segment)
        self._starts.append(segment.first_index)
        return segment

    @property
    def needs_sync(self) -> bool:
        """Whether entries wait for an fsync."""
        return self.durable_index < self.last_index

    @property
    def unsynced_bytes(self) -> int:
        """About how many bytes wait for an fsync: those of the active segment."""
        segment = self._segments[-1]
        first = max(self.durable_index + 1, segment.first_index)
        if first > segment.last_index:
            return 0
        return segment.size - segment.offsets[first - segment.first_index]

    def begin_sync(self) -> tuple[Callable[[], None], Ticket]:
        """The fsync to run, in any thread, and the ticket for `finish_sync`. One at a time."""
        self._syncing = self._segments[-1]
        return self._syncing.file.sync, Ticket(self._generation, self.last_index)

    def finish_sync(self, ticket: Ticket, error: BaseException | None = None) -> None:
        """The fsync of `ticket` ended; `error` is raised.

        A truncation since it was ordered makes the ticket void. An error counts all the same while
        the file is part of the log: the fsync may have run after the truncation, and have taken
        what was appended since. Of a file that the truncation removed it says nothing.
        """
        synced, self._syncing = self._syncing, None
        is_void = ticket.generation != self._generation
        if error is not None and (not is_void or any(s is synced for s in self._segments)):
            raise error
        if is_void:
            return
        self.durable_index = max(self.durable_index, ticket.index)

    def sync(self) -> None:
        """Make everything durable now."""
        job, ticket = self.begin_sync()
        job()
        self.finish_sync(ticket)

    def truncate_from(self, index: int) -> None:
        """Durably drop `index` and everything behind it, newest segment first.

        A crash half-way leaves a longer prefix of the same log, never a mixture.
        """
        if not self.anchor_index < index <= self.last_index:
            raise IndexError(index)
        self._generation += 1
        for dropped in range(index, self.last_index + 1):
            entry = self._cache.pop(dropped, None)
            self._cached_bytes -= len(entry[0]) if entry else 0
        self.last_index, self.last_term = index - 1, self.term_at(index - 1)
        self.durable_index = min(self.durable_index, self.last_index)
        while self._starts[-1] > index:
            self._starts.pop()
            self._segments.pop().remove()
        self._segments[-1].truncate_from(index)

    def compact_to(self, index: int) -> bool:
        """Drop whole segments that hold nothing above `index`, oldest first, a few at a time; True
        when any was dropped. What could not be deleted before is tried again."""
        droppable = sum(start <= index + 1 for start in self._starts[1:])
        dropped = 0
        for _ in range(segments_to_drop(droppable)):
            if self._segments[0] is self._syncing:
                break
            segment = self._segments.pop(0)
            self._starts.pop(0)
            self._set_anchor()
            segment.close()
            self._dropped.append(segment)
            dropped += 1
        if self._dropped and not self._deleting:
            self._delete_oldest()
        return dropped > 0

    def shed_clear_entries(self, index: int) -> None:
        """Entries up to `index` are in the clear, the later ones are not. A segment begins behind
        them, so that theirs can be dropped (`clear_index`), and what is in the log now is in no
        file of a later segment."""
        self._clear_until = max(self._clear_until, index)
        if self._segments[-1].first_index <= self._clear_until <= self.last_index:
            with contextlib.suppress(DiskFull):  # then the next entry begins it
                self._roll()
        self._reusable_from = max(self._reusable_from, self.last_index + 1, index + 1)
        self._dropped.extend(self._spares)
        self._spares.clear()
        if self._dropped and not self._deleting:
            self._delete_oldest()

    def _delete_oldest(self) -> None:
        segment = self._dropped[0]
        self._deleting = True
        keep = segment.first_index >= self._reusable_from and len(self._spares) < MOST_SPARES
        self._cleanup.submit(segment.make_spare if keep else segment.delete_files,
                             partial(self._deleted, segment, keep))

    def _deleted(self, segment: Segment, kept: bool, error: BaseException | None) -> None:
        self._deleting = False
        if self._closed:
            return
        if self._dropped and self._dropped[0] is segment:  # else a reset was quicker
            if error is not None:
                # What follows it stays, too: a gap would look like damage.
                self._cleanup_failed(error)
                return
            self._dropped.popleft()
            if kept and segment.first_index >= self._reusable_from:
                self._spares.append(segment)
            elif kept:
                self._dropped.append(segment)
        if self._dropped:
            self._delete_oldest()

    def reset(self, index: int, term: int) -> None:
        """Forget the whole log: it begins anew behind `index`, of `term`. Durable on return.

        Segments go newest first; a crash half-way leaves a prefix of the old log or none, which
        the caller's install marker tells it to reset again. What fails half-way leaves this object
        with an empty log.
        """
        self._generation += 1
        self.last_index, self.last_term = self.anchor_index, self.anchor_term
        self.durable_index = self.anchor_index
        self._remove_strays()
        while self._segments:
            self._starts.pop()
            self._segments.pop().remove()
        while self._dropped:
            # Perhaps under way elsewhere: deleting twice is no harm, and nothing is left behind.
            self._dropped.pop().delete_files()
        while self._spares:
            self._spares.pop().delete_files()
        self._cache.clear()
        self._cached_bytes = 0
        self._add(Segment.create(self._disk, self._directory, self._header(index + 1, term)))
        self.last_index, self.last_term = index, term
        self.durable_index = index
        self._set_anchor()

    def _remove_strays(self) -> None:
        """Delete, newest first, what is no part of the log: a removal that failed may have left it,
        and behind the log's new beginning it would look like damage."""
        known = {segment.path.stem for segment in (*self._segments, *self._dropped, *self._spares)}
        for name in reversed(self._disk.list(self._directory)):
            if name.endswith((LOG_SUFFIX, INDEX_SUFFIX, SPARE_SUFFIX, TEMPORARY_SUFFIX)) \
                    and name.partition(".")[0] not in known:
                self._disk.remove(self._directory / name)

    def close(self) -> None:
        """Close all files. Idempotent."""
        self._closed = True
        for segment in self._segments:
            segment.close()

    # --- opening ---------------------------------------------------------------------------

    def _set_anchor(self) -> None:
        first = self._segments[0]
        self.anchor_index = first.first_index - 1
        self.anchor_term = first.previous_term

    def _open(self) -> None:
        found = self._disk.list(self._directory)
        for name in found:
            if name.endswith((SPARE_SUFFIX, TEMPORARY_SUFFIX)):
                self._disk.remove(self._directory / name)
        names = [name for name in found if name.endswith(LOG_SUFFIX)]
        proven = 0
        for position, name in enumerate(names):
            proven = self._open_segment(self._directory / name, last=position == len(names) - 1)
        if not self._segments:
            self._add(Segment.create(self._disk, self._directory,
                                     self._header(FIRST_ANCHOR_INDEX + 1, 0)))
        self._make_tail_durable(self._prove(proven))
        self._set_anchor()
        self.last_index = self._segments[-1].last_index
        self.last_term = self._segments[-1].last_term

    def _prove(self, synced: int) -> int:
        """Up to which entry a record proves the log durable; `synced`: one that was cut. What is
        above that and known from an index file alone is read, and the log ends where it is damaged.

        Such a segment was sealed beside another fsync of its file, which failed: the kernel reports
        an error once, and so let the sealing succeed.
        """
        for segment in reversed(tuple(self._segments)):
            if segment.offsets and segment.last_index <= synced:
                break
            if not segment.is_scanned:
                tail = segment.scan(self._max_command_bytes, CONFIGURATION_KIND)
                if tail.damaged:
                    synced = self._cut_tail(segment, tail.offset, synced)
            if segment.offsets:
                synced = max(synced, segment.read(segment.last_index, 1, 0)[0].synced)
        return synced

    def _make_tail_durable(self, synced: int) -> None:
        """Make durable what was read, but for what is proven to be so up to `synced`."""
        for segment in self._segments:
            if segment.last_index > synced or segment is self._segments[-1]:
                segment.make_tail_durable(synced)

    def _open_segment(self, path: Path, *, last: bool) -> int:
        """Up to where what is cut off it proves the log durable."""
        file = self._disk.open_append(path)
        header = SegmentHeader.decode(file.pread(HEADER_SIZE, 0))
        if header is None:
            self._check_headerless(path, file.size(), last)
            file.close()
            self._disk.remove(path)
            return 0
        segment = Segment(self._disk, path, file, header)
        self._check_follows(segment)
        proven = 0
        if last or not segment.load_index():
            tail = segment.scan(self._max_command_bytes, CONFIGURATION_KIND)
            if tail.damaged:
                if not last:
                    raise self._damaged(segment, tail.offset)
                proven = self._cut_tail(segment, tail.offset)
        self._add(segment)
        return proven

    def _check_headerless(self, path: Path, size: int, last: bool) -> None:
        """A segment without a header is one that an older version was creating, or it is damaged.
        Nothing is written behind a header before it is durable."""
        expected = self._segments[-1].last_index + 1 if self._segments else FIRST_ANCHOR_INDEX + 1
        if not last or segment_name(expected) != path.name or size > HEADER_SIZE:
            raise JournalCorrupt(f"{path}: the header is damaged", remedy=JOIN_ANEW_REMEDY)

    def _check_follows(self, segment: Segment) -> None:
        if segment.path.name != segment_name(segment.first_index):
            raise JournalCorrupt(f"{segment.path} begins with entry {segment.first_index}",
                                 remedy=JOIN_ANEW_REMEDY)
        if self._segments:
            before = self._segments[-1]
            if (before.last_index + 1, before.last_term) != (segment.first_index,
                                                             segment.previous_term):
                raise JournalCorrupt(f"{segment.path} does not follow {before.path.name}",
                                     remedy=JOIN_ANEW_REMEDY)

    def _cut_tail(self, segment: Segment, offset: int, synced: int = 0) -> int:
        """Cut a torn tail, with the segments behind it, which prove the log durable up to `synced`;
        up to where all that is cut proves it. Raises `JournalCorrupt` when the damage is no torn
        tail.

        Behind a torn record of an unsynced group other records of the group may be whole, since a
        power cut keeps pages in any order. Only a record that was written when the damaged one was
        already durable proves corruption.
        """
        expected = segment.last_index + 1
        data = segment.file.pread(segment.file.size() - offset, offset)
        synced = max(synced, records.synced_behind(data, expected, self._max_command_bytes,
                                                   segment.salt))
        if synced >= expected:
            raise self._damaged(segment, offset)
        while self._segments and self._segments[-1].first_index > segment.first_index:
            self._starts.pop()
            self._segments.pop().remove()
        segment.cut(offset)
        return synced

    @staticmethod
    def _damaged(segment: Segment, offset: int) -> JournalCorrupt:
        return JournalCorrupt(
            f"{segment.path}: entry {segment.last_index + 1} at byte {offset} is damaged",
            remedy=JOIN_ANEW_REMEDY)
