"""Blocking work on a backend: done once, by whichever thread comes first."""

from __future__ import annotations

import threading

from elastickv.store.dek_counts import DekCounts


class Job:
    """One piece of work for the backend. Subclasses write `_work`.

    `run` may be called by a worker thread and, when something cannot wait for it, by the loop
    thread as well: the work happens once, and both see its outcome. A failed job is never tried
    again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.error: BaseException | None = None
        self.done = False
        self.dek_counts: DekCounts | None = None
        """Values by DEK when the job is done; None when it leaves them as they were."""

    def run(self) -> None:
        """Do the work, or wait for whoever does it. Blocking. Raises what the work raised."""
        with self._lock:
            if self.done:
                return
            if self.error is not None:
                raise self.error
            try:
                self._work()
            except BaseException as error:
                self.error = error
                raise
            self.done = True

    def _work(self) -> None:
        raise NotImplementedError
