"""One node as an operating system process: start, kill, freeze, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STOP_TIMEOUT_S = 20.0
FREEZE_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Exit:
    """A process that ended. `asked_for`: the harness ended it, or it ended by itself with a code
    that a fault explains."""

    node: str
    time_ns: int
    code: int
    asked_for: bool


def die_with_parent() -> list[str]:
    """A command prefix under which the child is killed when its parent dies, so that a killed
    harness leaves no nodes behind; empty where `setpriv` is missing."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


class NodeProcess:
    """The process of one node, across its restarts.

    `command` and `environment` may be changed while it does not run. `directory` is where it runs,
    `now_ns` the clock of the run. `expected_codes` are the exit codes with which the node may end
    by itself for now: none, unless a fault explains it. After a signal the code is negative.
    """

    def __init__(self, node: str, command: Sequence[str], environment: Mapping[str, str],
                 log_path: Path, now_ns: Callable[[], int], *,
                 directory: Path | None = None) -> None:
        self.node = node
        self.command = list(command)
        self.environment = dict(environment)
        self.log_path = log_path
        self.directory = directory
        self.exits: list[Exit] = []
        self.pids: list[int] = []
        """Of all its starts that came about."""
        self.starts = 0
        self.is_frozen = False
        self.expected_codes: frozenset[int] = frozenset()
        self._now_ns = now_ns
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        # The signal by which the harness ends it, while it does.
        self._ending: signal.Signals | None = None
        self._has_begun = asyncio.Event()
        self._has_begun.set()

    @property
    def is_running(self) -> bool:
        """True from `start` until the process has ended."""
        return not self._has_begun.is_set() \
            or (self._watcher is not None and not self._watcher.done())

    @property
    def pid(self) -> int:
        """The process id. Raises `RuntimeError` when it does not run."""
        if self._process is None or not self.is_running:
            raise RuntimeError(f"{self.node} does not run")
        return self._process.pid

    async def start(self) -> None:
        """Start it; its output is appended to the log file."""
        if self.is_running:
            raise RuntimeError(f"{self.node} runs already")
        self._ending = None
        self.is_frozen = False
        self.starts += 1
        self._has_begun.clear()
        try:
            with self.log_path.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self.command, env=self.environment, cwd=self.directory,
                    stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log)
            self.pids.append(self._process.pid)
            self._watcher = asyncio.create_task(self._watch(self._process))
        finally:
            self._has_begun.set()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        # Who is killed has no code of its own: another one is of a process that ended before.
        was_ended = self._ending is signal.SIGTERM or (self._ending is signal.SIGKILL
                                                       and code == -signal.SIGKILL)
        self.exits.append(Exit(self.node, self._now_ns(), code,
                               was_ended or code in self.expected_codes))

    async def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None when it still runs after `timeout_s`."""
        if self._watcher is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._watcher), timeout_s)
        if self.is_running or self._process is None:
            return None
        return self._process.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process has ended."""
        if self._process is not None and self.is_running:
            with contextlib.suppress(ProcessLookupError):
                # Not the process's own method: it asks for the exit code first, and of a process
                # that has just ended nobody else would get it then.
                os.kill(self._process.pid, number)

    async def kill(self) -> None:
        """`kill -9`, and wait for the end."""
        await self._has_begun.wait()
        self._ending = self._ending or signal.SIGKILL
        self.send_signal(signal.SIGKILL)
        await self.wait(STOP_TIMEOUT_S)

    def freeze(self) -> None:
        """SIGSTOP: the process keeps everything and does nothing."""
        self.is_frozen = True
        self.send_signal(signal.SIGSTOP)

    async def wait_frozen(self) -> None:
        """Return once the kernel says that the process is stopped. Raises `RuntimeError` when it
        does not within the time for stopping."""
        stat = Path(f"/proc/{self.pid}/stat")
        for _ in range(int(STOP_TIMEOUT_S / FREEZE_POLL_S)):
            # pid (name) state ...; the name may hold anything but is followed by the last ")".
            if stat.read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt":
                return
            await asyncio.sleep(FREEZE_POLL_S)
        raise RuntimeError(f"{self.node} was sent SIGSTOP and runs on")

    def thaw(self) -> None:
        """SIGCONT."""
        self.is_frozen = False
        self.send_signal(signal.SIGCONT)

    async def stop(self) -> int | None:
        """SIGTERM and wait; killed when that takes too long. The exit code, None if it was killed
        or did not run."""
        if not self.is_running:
            return None
        self._ending = signal.SIGTERM
        self.thaw()
        self.send_signal(signal.SIGTERM)
        code = await self.wait(STOP_TIMEOUT_S)
        if code is None:
            await self.kill()
        return code
