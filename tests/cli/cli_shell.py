"""Runs commands of `elastickv` as a shell does: arguments and stdin in, exit code and bytes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: bytes
    err: str

    @property
    def document(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[list[str]]:
        """stdout as tab-separated cells."""
        return [line.split("\t") for line in self.out.decode().splitlines()]


Shell = Callable[..., Done]
