"""No (key id, nonce) twice: a ledger of every envelope found on any disk.

    version(1) | flag(1) | key_id(4) | nonce(12) | ciphertext | tag(16)

The same envelope may lie in many places: replicas, snapshots and journals carry the same bytes. Two
*different* envelopes with one key id and nonce are the violation: whoever has both learns the
difference of their plaintexts, and under GCM can forge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from elastickv.crypto.cipher import open_raft
from elastickv.crypto.envelope import HEADER_BYTES, PREFIX_BYTES, parse_prefix
from elastickv.crypto.keystore import Keystore
from elastickv.errors import CorruptionError
from elastickv.store.header import HEADER_BYTES as VALUE_HEADER_BYTES
from elastickv.store.header import EncryptionState, parse_header
from elastickv.wire import CLEAR_OPCODES, Rotation, RotationTag, Writes, decode_entry

_DIGEST_BYTES = 16
MAX_PROBLEMS = 20


class NonceLedger:
    """Remembers (key id, nonce) with a digest of the whole envelope, and where it was first
    seen."""

    def __init__(self) -> None:
        self.envelopes = 0
        self.reused = 0
        self.problems: list[str] = []
        self._seen: dict[bytes, tuple[bytes, str]] = {}

    @property
    def distinct(self) -> int:
        """How many different (key id, nonce) pairs were seen."""
        return len(self._seen)

    def add(self, envelope: bytes, where: str) -> None:
        """Enter one envelope. Raises `EnvelopeError` when the bytes are none."""
        parse_prefix(envelope)
        self.envelopes += 1
        name = bytes(envelope[2:HEADER_BYTES])
        digest = hashlib.blake2b(envelope, digest_size=_DIGEST_BYTES).digest()
        known = self._seen.setdefault(name, (digest, where))
        if known[0] == digest:
            return
        self.reused += 1
        if len(self.problems) < MAX_PROBLEMS:
            key_id = int.from_bytes(envelope[2:PREFIX_BYTES], "big")
            nonce = envelope[PREFIX_BYTES:HEADER_BYTES].hex()
            self.problems.append(f"nonce {nonce} was used twice under key {key_id}: "
                                 f"{known[1]} and {where}")


class PayloadReader:
    """Finds the envelopes in log payloads: the payload itself after the raft cutover, and the
    sealed values in it.

    `cutover_index` 0 means that no payload is sealed. `unopened` counts payloads that were neither
    opened nor understood; while it is not zero, nothing is proven of what they hold. `cutover_term`
    is the last term of the cutover's entry; 0 while none was read.
    """

    def __init__(self, keystore: Keystore, cutover_index: int) -> None:
        self._keystore = keystore
        self._cutover_index = cutover_index
        self.unopened = 0
        self.cutover_term = 0
        self._clear: set[tuple[int, int]] = set()

    @property
    def left_clear(self) -> list[tuple[int, int]]:
        """(index, term) of the payloads that had to be sealed and were not: whoever led in the
        cutover's term or a later one had its entry in the log."""
        return sorted((index, term) for index, term in self._clear
                      if 0 < self.cutover_term <= term)

    def envelopes(self, index: int, term: int, payload: bytes) -> Iterator[bytes]:
        """Every envelope in the payload of a log entry, the outer one first."""
        if not payload:
            return
        clear = payload
        if self._is_sealed(index, payload):
            try:
                clear = open_raft(self._keystore, payload)
                yield payload
            except CorruptionError:
                # Perhaps of a leader that was deposed before the cutover committed.
                clear = payload
        try:
            entry = decode_entry(clear)
        except CorruptionError:
            self.unopened += 1
            return
        if index == self._cutover_index and isinstance(entry, Rotation) \
                and entry.tag is RotationTag.ENABLE_RAFT_ENVELOPE:
            self.cutover_term = max(self.cutover_term, term)
        if clear is payload and self._is_sealed(index, payload):
            self._clear.add((index, term))
        if isinstance(entry, Writes):
            for request in entry.requests:
                for op in request.ops:
                    yield from record_envelopes(op.record)

    def _is_sealed(self, index: int, payload: bytes) -> bool:
        return (0 < self._cutover_index < index) and payload[0] not in CLEAR_OPCODES


def record_envelopes(record: bytes) -> Iterator[bytes]:
    """The envelope in a stored record (value header + body), if it is sealed."""
    header = parse_header(record)
    if header.state is EncryptionState.ENVELOPE and not header.tombstone:
        yield record[VALUE_HEADER_BYTES:]
