"""A way in for threads that use what another one may take away."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Any number of threads may be inside while it is open. Whoever shuts it waits until all of
    them are out; nobody comes in until it is opened again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self.is_shut = False

    @contextlib.contextmanager
    def inside(self) -> Iterator[bool]:
        """Be inside; False, at once and without being so, while the gate is shut. Whoever stays
        long should look at `is_shut`."""
        with self._changed:
            may_enter = not self.is_shut
            self._inside += may_enter
        try:
            yield may_enter
        finally:
            with self._changed:
                self._inside -= may_enter
                self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more, and wait until nobody is inside. Idempotent."""
        with self._changed:
            self.is_shut = True
            self._changed.wait_for(lambda: not self._inside)

    def open(self) -> None:
        """The opposite."""
        with self._changed:
            self.is_shut = False
