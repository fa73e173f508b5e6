"""The audit of an LMDB file: everything that a lookup, a scan or an allocation will rely on.

LMDB's pages carry no checksum. The values do (`records`), but a damaged branch page, key, page
header or free list makes a lookup miss a key that is there, or a later write destroy a live page,
without an error. The audit walks every reachable page and refuses the file unless

* both meta pages are sound, are of consecutive transactions, and of those that their
  free lists name;
* every page stores its own number, is reached once, lies within the file, and is packed as LMDB
  packs it;
* every key lies between the separators above it and after its left neighbour, so that a lookup
  finds it;
* every stored value passes its checksum, and each table's entries add up to its totals;
* no page in the free list is in use, what the file is too short for is in it, and each tree has the
  depth and counts that it claims.

A flipped bit in a page that nothing reaches is harmless and not looked for. The file is read and
never mapped, so that neither damage nor a disk that fails a read can crash the process: that is an
`OSError`, while through a map it would be a signal (SIGBUS).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from elastickv.errors import JOIN_ANEW_REMEDY, StoreCorrupt
from elastickv.store import lmdb_format as fmt
from elastickv.store.lmdb_format import Meta, Tree
from elastickv.store.records import Totals, checksum_fits
from elastickv.store.tables import Table

TOTALS = b"totals"


class Image(Protocol):
    """The bytes of a file. A slice ends where the file does."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


class FileImage:
    """The `Image` of an open file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice, /) -> bytes:
        start = part.start or 0
        return os.pread(self._descriptor, part.stop - start, start)


class AuditResult(NamedTuple):
    """What was walked: `entries` of the tables, `pages` of any kind, free ones included."""

    transaction: int
    pages: int
    entries: int


Leaf = tuple[bytes, int, bytes, int]
"""One leaf node: key, flags, data (of an overflow node: its page number), size of the data."""


def _fail(reason: str) -> NoReturn:
    raise StoreCorrupt(f"the store's file is damaged: {reason}",
                       remedy=JOIN_ANEW_REMEDY)


class _Walk:
    """The walk of one committed state of a file; pages count as free until reached."""

    def __init__(self, image: Image, meta: Meta) -> None:
        self._image = image
        self._meta = meta
        self._page_bytes = meta.page_bytes
        # A transaction that gives back a new page does not write it, be it the last one.
        self._live = bytearray(min(meta.last_page + 1, len(image) // meta.page_bytes))
        self.pages = 0

    def _claim(self, number: int, count: int = 1) -> None:
        """Mark pages as reached. A page reached twice, or outside the file, is damage."""
        end = number + count
        if number < fmt.META_PAGES or end > len(self._live) or count < 1:
            _fail(f"page {number} is out of range")
        if 1 in self._live[number:end]:
            _fail(f"page {number} is reached twice")
        self._live[number:end] = b"\1" * count
        self.pages += count

    def _page(self, number: int) -> bytes:
        start = number * self._page_bytes
        return self._image[start:start + self._page_bytes]

    def _nodes(self, number: int, page: bytes) -> list[int]:
        """The offsets of a page's nodes; its bounds are checked, its nodes not yet."""
        _, _, _, lower, upper = fmt.PAGE_HEADER.unpack_from(page)
        if lower % 2 or not fmt.PAGE_HEADER_BYTES <= lower <= upper <= self._page_bytes:
            _fail(f"page {number} has impossible bounds")
        count = (lower - fmt.PAGE_HEADER_BYTES) // 2
        offsets = list(struct.unpack_from(f"={count}H", page, fmt.PAGE_HEADER_BYTES))
        if offsets and not (min(offsets) >= upper
                            and max(offsets) <= self._page_bytes - fmt.NODE_HEADER_BYTES):
            _fail(f"page {number} has a node out of bounds")
        return offsets

    def _check_packed(self, number: int, page: bytes, used: int) -> None:
        """Nodes fill a page from `upper` on, without gaps: else an insert would overwrite one."""
        upper = fmt.PAGE_HEADER.unpack_from(page)[4]
        if upper + used != self._page_bytes:
            _fail(f"page {number} is not packed")

    def leaves(self, tree: Tree, name: str) -> Iterator[Leaf]:
        """The leaf nodes of a tree in key order, everything above and around them checked."""
        for nodes in self.leaf_pages(tree, name):
            yield from nodes

    def leaf_pages(self, tree: Tree, name: str) -> Iterator[list[Leaf]]:
        """`leaves`, page by page.

        Keys are compared as bytes, or as numbers in the free tree (`name` "free").
        """
        if tree.root == fmt.NO_PAGE:
            if tree.entries or tree.branch_pages or tree.leaf_pages or tree.overflow_pages:
                _fail(f"the empty tree {name} claims content")
            return
        branch_pages = leaf_pages = entries = 0
        self._overflow_pages = 0
        # (page, depth, low, high): the keys below the page are in [low, high); None = unbounded.
        stack: list[tuple[int, int, bytes | None, bytes | None]] = [(tree.root, 1, None, None)]
        while stack:
            number, depth, low, high = stack.pop()
            self._claim(number)
            page = self._page(number)
            stored, _, flags, _, _ = fmt.PAGE_HEADER.unpack_from(page)
            if stored != number:
                _fail(f"page {number} says that it is page {stored}")
            if flags == fmt.PAGE_BRANCH and depth < tree.depth:
                branch_pages += 1
                stack.extend(reversed(self._children(number, page, depth, low, high, name)))
            elif flags == fmt.PAGE_LEAF and depth == tree.depth:
                leaf_pages += 1
                nodes = self._leaf_nodes(number, page, low, high, name)
                entries += len(nodes)
                yield nodes
            else:
                _fail(f"page {number} has the flags {flags:#x} at depth {depth}")
        walked = (branch_pages, leaf_pages, self._overflow_pages, entries)
        if walked != (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries):
            _fail(f"tree {name} does not have the pages and entries that it claims")

    def _children(self, number: int, page: bytes, depth: int, low: bytes | None,
                  high: bytes | None, name: str,
                  ) -> list[tuple[int, int, bytes | None, bytes | None]]:
        children: list[tuple[int, bytes | None]] = []
        used = 0
        for position, offset in enumerate(self._nodes(number, page)):
            word0, word1, word2, key_size = fmt.NODE_HEADER.unpack_from(page, offset)
            start = offset + fmt.NODE_HEADER_BYTES
            if start + key_size > self._page_bytes:
                _fail(f"page {number} has a key out of bounds")
            used += (fmt.NODE_HEADER_BYTES + key_size + 1) & ~1
            # LMDB never looks at the first separator: everything below the second is in child 0.
            separator = page[start:start + key_size] if position else low
            children.append((word0 | word1 << 16 | word2 << 32, separator))
        self._check_packed(number, page, used)
        if len(children) < 2:
            _fail(f"branch page {number} has fewer than two children")
        ranges = []
        for position, (child, separator) in enumerate(children):
            upper = children[position + 1][1] if position + 1 < len(children) else high
            if not _ascends(separator, upper, name):
                _fail(f"page {number} has separators out of order")
            ranges.append((child, depth + 1, separator, upper))
        return ranges

    def _leaf_nodes(self, number: int, page: bytes, low: bytes | None, high: bytes | None,
                    name: str) -> list[Leaf]:
        previous: bytes | None = None
        used = 0
        leaves: list[Leaf] = []
        unpack = fmt.NODE_HEADER.unpack_from
        numeric = name == "free"
        for offset in self._nodes(number, page):
            size_low, size_high, flags, key_size = unpack(page, offset)
            middle = offset + 8 + key_size
            size = size_low | size_high << 16
            stored = 8 if flags & fmt.NODE_OVERFLOW else size
            if middle + stored > self._page_bytes:
                _fail(f"page {number} has a node out of bounds")
            used += (8 + key_size + stored + 1) & ~1
            key = page[offset + 8:middle]
            if previous is None:
                if low is not None and not (key == low or _ascends(low, key, name)):
                    _fail(f"page {number} has a key below its range")
            elif not (_ascends(previous, key, name) if numeric else previous < key):
                _fail(f"page {number} has keys out of order")
            previous = key
            leaves.append((key, flags, page[middle:middle + stored], size))
        if previous is not None and not _ascends(previous, high, name):
            _fail(f"page {number} has a key above its range")
        self._check_packed(number, page, used)
        return leaves

    def data_of(self, leaf: Leaf, name: str) -> bytes:
        """A leaf node's data, from its overflow pages if it has them."""
        _, flags, data, size = leaf
        if flags == 0:
            return data
        if flags != fmt.NODE_OVERFLOW:
            _fail(f"tree {name} has a node with the flags {flags:#x}")
        number = fmt.PAGE_NUMBER.unpack(data)[0]
        if not fmt.META_PAGES <= number < len(self._live):
            _fail(f"page {number} is out of range")
        start = number * self._page_bytes
        stored, _, page_flags, count = fmt.OVERFLOW_HEADER.unpack(
            self._image[start:start + fmt.PAGE_HEADER_BYTES])
        begin = start + fmt.PAGE_HEADER_BYTES
        if (stored != number or page_flags != fmt.PAGE_OVERFLOW
                or size > count * self._page_bytes - fmt.PAGE_HEADER_BYTES):
            _fail(f"overflow page {number} does not parse")
        self._claim(number, count)
        self._overflow_pages += count
        return self._image[begin:begin + size]

    def check_free_list(self) -> None:
        """After all trees: no free page may be in use or be listed twice, and what the file is too
        short for must be free."""
        lists = [(leaf[0], self.data_of(leaf, "free"))
                 for leaf in self.leaves(self._meta.free, "free")]
        unwritten: list[int] = []
        for key, data in lists:
            if len(key) != 8 or _number(key) > self._meta.transaction or not data or (
                    len(data) % 8):
                _fail("a free-list entry does not parse")
            count, *numbers = struct.unpack(f"={len(data) // 8}Q", data)
            if count > len(numbers):
                _fail("a free-list entry is cut short")
            for number in numbers[:count]:
                if len(self._live) <= number <= self._meta.last_page:
                    unwritten.append(number)
                else:
                    self._claim(number)
        missing = self._meta.last_page + 1 - len(self._live)
        if not len(unwritten) == len(set(unwritten)) == missing:
            _fail("it is shorter than its last page")
        self.pages += missing


def _number(key: bytes) -> int:
    return int(fmt.PAGE_NUMBER.unpack(key)[0])


def _ascends(lower: bytes | None, upper: bytes | None, name: str) -> bool:
    """lower < upper in the order of tree `name`; None is unbounded on either side."""
    if lower is None or upper is None:
        return True
    if name != "free":
        return lower < upper
    return len(lower) == 8 == len(upper) and _number(lower) < _number(upper)


def newest_meta(image: Image) -> Meta:
    """The committed state of a file at rest. Raises `StoreCorrupt` unless both metas make sense.

    One damaged bit of a transaction number could pass the older state off as the newest one. But
    every transaction after the first replaces pages and lists them in its own free list under its
    number, so the numbers of both metas are checked against their free lists.
    """
    first = fmt.decode_meta(image[:fmt.META_BYTES], 0)
    page_bytes = first.page_bytes
    if page_bytes < 512 or page_bytes & (page_bytes - 1) or page_bytes > 65536:
        _fail(f"the page size {page_bytes} is impossible")
    second = fmt.decode_meta(image[page_bytes:page_bytes + fmt.META_BYTES], 1)
    if second.page_bytes != page_bytes:
        _fail("the meta pages disagree on the page size")
    older, newer = sorted((first, second), key=lambda meta: meta.transaction)
    if newer.transaction - older.transaction != 1 and newer.transaction != 0:
        _fail("the meta pages are not of consecutive transactions")
    for meta in (older, newer):
        walk = _Walk(image, meta)
        last = 0
        for leaf in walk.leaves(meta.free, "free"):
            walk.data_of(leaf, "free")
            last = _number(leaf[0]) if len(leaf[0]) == 8 else fmt.NO_PAGE
        if last != meta.transaction and (last or meta.transaction > 1):
            _fail("a meta page and its free list are of different transactions")
    return newer


def meta_of(image: Image, transaction: int) -> Meta:
    """The state that `transaction` committed, one of the last two."""
    first = fmt.decode_meta(image[:fmt.META_BYTES], 0)
    page_bytes = first.page_bytes
    second = fmt.decode_meta(image[page_bytes:page_bytes + fmt.META_BYTES], 1)
    for meta in (first, second):
        if meta.transaction == transaction:
            return meta
    _fail(f"there is no meta page of transaction {transaction}")


def _trees(walk: _Walk, meta: Meta) -> dict[bytes, Tree]:
    trees: dict[bytes, Tree] = {}
    for leaf in walk.leaves(meta.main, "main"):
        name, flags, data, _ = leaf
        if flags != fmt.NODE_TREE:
            _fail("the list of tables holds something else")
        tree = fmt.decode_tree(data)
        if tree.flags or tree.pad:
            _fail("a table has impossible flags")
        trees[name] = tree
    if not trees.keys() <= {TOTALS, *(table.value.encode() for table in Table)}:
        _fail("the list of tables has an unknown name")
    return trees


def _audit_tables(walk: _Walk, trees: dict[bytes, Tree]) -> int:
    """Check every entry of every table; the number of entries."""
    entries = 0
    expected: dict[bytes, Totals] = {}
    if TOTALS in trees:
        for leaf in walk.leaves(trees[TOTALS], "totals"):
            data = walk.data_of(leaf, "totals")
            if not checksum_fits(Table.META, leaf[0], data):
                _fail("a table's totals fail their checksum")
            expected[leaf[0]] = Totals.decode(data[:-4])
    for table in Table:
        name = table.value.encode()
        found = Totals()
        for leaves in walk.leaf_pages(trees[name], table) if name in trees else ():
            for leaf in leaves:
                data = leaf[2] if not leaf[1] else walk.data_of(leaf, table)
                if not checksum_fits(table, leaf[0], data):
                    _fail(f"an entry of table {table} fails its checksum")
                found.add(data)
        if found != expected.pop(name, Totals()):
            _fail(f"table {table} does not add up to its totals")
        entries += found.count
    if expected:
        _fail("there are totals of an unknown table")
    return entries


def audit_image(image: Image, meta: Meta) -> AuditResult:
    """Audit one committed state. Raises `StoreCorrupt` at the first finding."""
    walk = _Walk(image, meta)
    entries = _audit_tables(walk, _trees(walk, meta))
    walk.check_free_list()
    return AuditResult(meta.transaction, walk.pages, entries)


def audit_file(path: Path, transaction: int | None = None, *,
               on_meta: Callable[[], None] = lambda: None) -> AuditResult:
    """Audit a file. Raises `StoreCorrupt` at the first finding, `OSError` when a read fails.

    Without `transaction` nobody may write the file meanwhile. With it that state is audited, which
    a read transaction of the caller must keep from being overwritten. Its meta page is not kept by
    that: nobody may write before `on_meta()` was called, when it has been read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < fmt.META_BYTES:
            _fail("it ends within its meta pages")
        image = FileImage(descriptor)
        meta = newest_meta(image) if transaction is None else meta_of(image, transaction)
        on_meta()
        return audit_image(image, meta)
    except (struct.error, IndexError):
        # Every offset is checked before use; should one check be missing, damage stays damage.
        raise StoreCorrupt("the store's file does not parse") from None
    finally:
        os.close(descriptor)
