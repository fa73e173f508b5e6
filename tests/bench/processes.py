"""Server processes on loopback: start, stop, and what they use."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from elastickv.config import without_variables
from jepsen.network.ports import HOST

# The kernel kills the server when the benchmark dies. A preexec_fn could do the same, but would run
# gRPC's fork handlers in the child, which abort it when channels are open.
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ClusterFailed(Exception):
    """A server did not start, or died."""


def listens(port: int) -> bool:
    """Whether a connection to the port is accepted."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


class ServerProcess:
    """One server; its output goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path,
                 environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*_WITH_PARENT, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**without_variables(os.environ), **(environment or {})})

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raise `ClusterFailed` with the end of its log if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise ClusterFailed(f"{self.log} ended with exit code {code}:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The end of its output so far."""
        return self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """kill -9, and reap."""
        self._process.kill()
        self._process.wait()

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM, then kill -9 after `timeout_s`."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def cpu_s(self) -> float:
        """Processor time used so far, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def has_children(self) -> bool:
        """Whether the server runs another process."""
        return bool(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())

    def memory_bytes(self) -> dict[str, int]:
        """`rss` (resident), and its parts `anonymous` (heap) and `file` (store, libraries)."""
        wanted = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file"}
        found = {}
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in wanted:
                found[wanted[name]] = int(value.split()[0]) * 1024
        return found


def wait_until(condition: Callable[[], bool], processes: Sequence[ServerProcess], *,
               timeout_s: float, what: str) -> float:
    """Poll until `condition()`; the seconds it took. A dead process ends the wait at once.

    Raises `ClusterFailed` with the ends of the logs.
    """
    started = time.monotonic()
    while not condition():
        for process in processes:
            process.check()
        if time.monotonic() - started > timeout_s:
            tails = "".join(f"\n{process.log}:\n{process.log_tail()}" for process in processes)
            raise ClusterFailed(f"{what}: not within {timeout_s:g} s{tails}")
        time.sleep(0.02)
    return time.monotonic() - started


def directory_bytes(directory: Path) -> int:
    """Space that the files under `directory` take on disk (blocks, so holes do not count)."""
    return sum(path.stat().st_blocks * 512
               for path in directory.rglob("*") if path.is_file())
