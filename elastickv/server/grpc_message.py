"""A status's detail on the wire: the header `grpc-message`. Pure."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

MAX_DETAIL_BYTES: Final = 4096
"""On the wire, percent-encoded: clients refuse headers of more than 8 KiB in all."""

_AS_IT_IS: Final = bytes(byte for byte in range(0x20, 0x7F) if byte != ord("%"))


def percent_encoded(text: str) -> bytes:
    """Printable ASCII except % as it is, every other byte of UTF-8 as %XX."""
    return quote_from_bytes(text.encode("utf-8", "replace"), _AS_IT_IS).encode("ascii")


def fitted(text: str) -> str:
    """`text` as UTF-8 can hold it, cut so that it fits into headers."""
    content = text.encode("utf-8", "replace")
    if 3 * len(content) <= MAX_DETAIL_BYTES:  # whatever of it is encoded
        return content.decode()
    encoded = percent_encoded(text)
    if len(encoded) <= MAX_DETAIL_BYTES:
        return content.decode()
    kept = encoded[:MAX_DETAIL_BYTES - 3]
    if b"%" in kept[-2:]:  # within an escape
        kept = kept[:kept.rindex(b"%")]
    return unquote_to_bytes(kept).decode("utf-8", "ignore") + "..."
