"""CRC-32Cs of many parts of the same bytes, each in a time that does not grow with the part.

What looks for records in bytes that somebody else chose may have to check as many parts as there
are bytes, each as long as the rest. A CRC is linear: of `checksum` continued over some bytes one
part is what as many zeros make of `checksum`, and the rest depends on the bytes alone. So with the
checksums of all beginnings `B`, that over a part is that of the longer beginning, but for what as
many zeros make of `checksum` and the shorter one:

    extend(c, data[s:e]) = behind_zeros(c ^ B(s), e - s) ^ B(e)
"""

from __future__ import annotations

from functools import cache

from google_crc32c import extend

_BLOCK_BYTES = 1024
"""Of the beginnings only those of whole blocks are kept."""

_Tables = tuple[list[int], list[int], list[int], list[int]]


class PartChecksums:
    """The checksums of the parts of `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._beginnings = [0]
        for end in range(_BLOCK_BYTES, len(data) + 1, _BLOCK_BYTES):
            self._beginnings.append(
                int(extend(self._beginnings[-1], data[end - _BLOCK_BYTES:end])))

    def extend(self, checksum: int, start: int, end: int) -> int:
        """`checksum` continued over `data[start:end]`."""
        return behind_zeros(checksum ^ self._beginning(start), end - start) ^ self._beginning(end)

    def _beginning(self, end: int) -> int:
        block, rest = divmod(end, _BLOCK_BYTES)
        return int(extend(self._beginnings[block], self._data[end - rest:end]))


def behind_zeros(difference: int, count: int) -> int:
    """The difference of two checksums, each continued over `count` zeros."""
    power = 0
    while count:
        if count & 1:
            difference = _looked_up(_tables(power), difference)
        count >>= 1
        power += 1
    return difference


def _looked_up(tables: _Tables, difference: int) -> int:
    first, second, third, fourth = tables
    return (first[difference & 255] ^ second[difference >> 8 & 255]
            ^ third[difference >> 16 & 255] ^ fourth[difference >> 24])


@cache
def _tables(power: int) -> _Tables:
    """By each byte of a difference, `behind_zeros` of 2**power."""
    if power:
        half = _tables(power - 1)
        of_bits = [_looked_up(half, _looked_up(half, 1 << bit)) for bit in range(32)]
    else:
        of_bits = [int(extend(1 << bit, b"\0")) ^ int(extend(0, b"\0")) for bit in range(32)]
    return (_table(of_bits[:8]), _table(of_bits[8:16]), _table(of_bits[16:24]),
            _table(of_bits[24:]))


def _table(of_bits: list[int]) -> list[int]:
    table = [0]
    for of_bit in of_bits:
        table += [of_bit ^ entry for entry in table]
    return table
