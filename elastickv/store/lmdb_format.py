"""LMDB 0.9's file layout, read without LMDB (64-bit, this machine's byte order).

LMDB trusts its file: a damaged page can make it miss a key, hand out a live page as free, or read
outside the map. So the audit reads the pages itself, with every offset checked.

    page         number (8) | pad (2) | flags (2) | lower (2) upper (2), or overflow pages (4)
                 | body
    meta page    page header | magic (4) version (4) address (8) map size (8) | free tree (48)
                 | main tree (48) | last page (8) | transaction (8)
    tree         pad (4) flags (2) depth (2) | branch, leaf, overflow pages, entries, root (8 each)
    node         low (2) high (2) flags (2) key size (2) | key | data

A branch or leaf page's body starts with a 2-byte offset per node, up to `lower`; nodes fill the
page from `upper` to its end. In a leaf, low and high are the data's size; in a branch, with the
flags, the child page. The free tree's pad is the page size. An entry of it maps a transaction to
count (8) and that many page numbers (8 each).
"""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

from elastickv.errors import StoreCorrupt

MAGIC = 0xBEEFC0DE
DATA_VERSION = 1
META_PAGES = 2
PAGE_HEADER_BYTES = 16
NODE_HEADER_BYTES = 8
NO_PAGE = (1 << 64) - 1
MAX_DEPTH = 32

PAGE_BRANCH = 0x01
PAGE_LEAF = 0x02
PAGE_OVERFLOW = 0x04
PAGE_META = 0x08

NODE_OVERFLOW = 0x01
NODE_TREE = 0x02

FREE_TREE_FLAGS = 0x4008
"""MDB_INTEGERKEY (keys are transaction numbers) and, kept in the same place, MDB_NOSUBDIR."""

_E = "<" if sys.byteorder == "little" else ">"
PAGE_HEADER = struct.Struct(_E + "QHHHH")
OVERFLOW_HEADER = struct.Struct(_E + "QHHI")
NODE_HEADER = struct.Struct(_E + "HHHH")
PAGE_NUMBER = struct.Struct(_E + "Q")
_TREE = struct.Struct(_E + "IHHQQQQQ")
_META = struct.Struct(_E + "IIQQ48s48sQQ")
META_BYTES = PAGE_HEADER_BYTES + _META.size
TREE_BYTES = _TREE.size


class Tree(NamedTuple):
    """A B+tree's description."""

    pad: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class Meta(NamedTuple):
    """A meta page: one committed state."""

    page_bytes: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int


def decode_tree(data: bytes) -> Tree:
    """A tree's 48 bytes. Raises `StoreCorrupt` when an empty tree claims content or the reverse."""
    if len(data) != TREE_BYTES:
        raise StoreCorrupt("a tree's description has the wrong length")
    tree = Tree(*_TREE.unpack(data))
    if tree.depth > MAX_DEPTH:
        raise StoreCorrupt(f"a tree claims the depth {tree.depth}")
    if (tree.root == NO_PAGE) != (tree.depth == 0):
        raise StoreCorrupt("a tree's root and depth contradict each other")
    return tree


def decode_meta(page: bytes, number: int) -> Meta:
    """Meta page `number` (0 or 1). Raises `StoreCorrupt` when it is not a sound one."""
    if len(page) < META_BYTES:
        raise StoreCorrupt("the file ends within its meta pages")
    found, _, flags, _, _ = PAGE_HEADER.unpack_from(page)
    magic, version, _, _, free, main, last_page, transaction = _META.unpack_from(
        page, PAGE_HEADER_BYTES)
    if found != number or flags != PAGE_META or magic != MAGIC or version != DATA_VERSION:
        raise StoreCorrupt(f"meta page {number} does not parse")
    free_tree = decode_tree(free)
    meta = Meta(free_tree.pad, free_tree, decode_tree(main), last_page, transaction)
    if meta.free.flags != FREE_TREE_FLAGS or meta.main.flags != 0 or meta.main.pad != 0:
        raise StoreCorrupt(f"meta page {number} has impossible flags")
    # Transaction n writes page n modulo 2.
    if transaction % 2 != number and transaction != 0:
        raise StoreCorrupt(f"meta page {number} holds transaction {transaction}")
    return meta
