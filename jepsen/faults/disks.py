"""Disks that are full, fail, are lost, or come back from the past."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Sequence
from pathlib import Path

from elastickv.errors import ExitCode
from jepsen import preload
from jepsen.cluster import POLL_S, Cluster
from jepsen.faults.api import Fault, NotAvailable, NotNow, Requirements, Violation
from jepsen.network import Unsupported
from jepsen.preload import Preload

WRITING_CALLS = ("posix/io/rw/pwrite", "posix/io/rw/pwritev")
SYNCING_CALLS = ("posix/io/sync/fsync", "posix/io/sync/fdatasync", "posix/io/dir/rename")
"""libfiu's names of the calls that write to the journal and the store, and of those that make
durable. Not `write`: sockets, the log and libfiu's own answers go through it."""

NEARLY_FULL_BYTES = 1 << 20
"""What the node itself may have freed again at once."""

FAILED_DISK_CODES = frozenset({ExitCode.DISK_FAILED})
"""With this a node ends by a disk that fails. None ends by one that is full."""

FAILURE_PROBABILITY = 0.2
GROWTHS_AT_MOST = 40
"""How often the log of a node under I/O errors can be seen to grow. For each time it was written
and synced at least once; that none of these calls fails has a probability of
(1 - FAILURE_PROBABILITY) ** (2 * 40), less than 1 in 50 million."""
ENTRIES_AT_MOST = 200
"""How many entries the others can have logged, when time is up, since the log of a node under I/O
errors was last seen to grow. A member that is well lacks what is under way, and what is logged in
the second that it may take to answer."""
HALT_TIMEOUT_S = 10.0
"""A node that met an error needs a second or two to close what it has open."""
ENDING_S = 1.0
"""A process that does not answer within this time any more is not about to end."""
AHEAD_S = 1.0
"""How long a node runs on after its disk was copied, counted from when it has applied more."""

AHEAD_TIMEOUT_S = 20.0


class _OneDisk(Fault):
    """Something about the disk of one node, which may end meanwhile."""

    def __init__(self, cluster: Cluster, source: random.Random) -> None:
        super().__init__(cluster, source)
        self._node = ""

    def ending(self) -> str:
        """How the node came through so far."""
        process = self.cluster.processes[self._node]
        return "it runs on" if process.is_running else f"it ended with {process.exits[-1].code}"


class _FailingCalls(_OneDisk):
    """Makes system calls of one node fail, by libfiu."""

    _failing_pid = 0

    async def enable(self, node: str, calls: Sequence[str], probability: float,
                     error: int) -> None:
        """From now on each of `calls` fails with `error` that often; the node may end of the first
        that does. Raises `NotAvailable`, or `NotNow` when it does not run."""
        if not self.cluster.processes[node].is_running:
            raise NotNow(f"{node} does not run")
        self._failing_pid = self.cluster.processes[node].pid
        for call in calls:
            await self._control(node, f"enable_random name={call},probability={probability},"
                                      f"failinfo={error}")

    async def disable(self, node: str, calls: Sequence[str]) -> None:
        """The calls work again, unless the process has ended: a new one has no failures enabled."""
        for call in calls:
            await self._control(node, f"disable name={call}")

    async def _control(self, node: str, command: str) -> None:
        process = self.cluster.processes[node]
        if not process.is_running or process.pid != self._failing_pid:
            return
        try:
            await asyncio.to_thread(preload.control_fiu, self.cluster.preload_files(node),
                                    process.pid, command)
        except Unsupported as error:
            if await process.wait(ENDING_S) is None:
                raise NotAvailable(str(error)) from None


class DiskFull(_FailingCalls):
    """Nothing more fits on one node's disk. It refuses writes and runs on, and loses nothing."""

    name = "disk-full"
    requirements = Requirements(small_disk=True)

    async def inject(self) -> str:
        self._node = node = await self.some_node()
        if not self.cluster.options.small_disk_mib:
            await self.enable(node, WRITING_CALLS, 1.0, errno.ENOSPC)
            return f"{node}: ENOSPC on every write"
        directory = self.cluster.data_directory(node)
        ballast = await asyncio.to_thread(preload.fill_disk, directory)
        if (free := preload.free_bytes(directory)) > NEARLY_FULL_BYTES:
            raise NotNow(f"{free} bytes are still free on the disk of {node}")
        return f"{node} full, {ballast >> 20} MiB of ballast"

    async def effect(self) -> str:
        if not self.cluster.options.small_disk_mib:
            # The process itself has confirmed the command, and every write fails: nothing to see
            # from outside where the node refuses writes and runs on.
            return self.ending()
        return (f"{preload.free_bytes(self.cluster.data_directory(self._node))} bytes free, "
                f"{self.ending()}")

    async def heal(self) -> None:
        node, self._node = self._node, ""
        if self.cluster.options.small_disk_mib:
            for each in self.cluster.nodes:
                preload.empty_disk(self.cluster.data_directory(each))
        elif node:
            await self.disable(node, WRITING_CALLS)
        await self.restart_all()


class IoError(_FailingCalls):
    """Writing and syncing fail with EIO, now and then, on one node. It has to stop rather than go
    on with a disk that may have lost what was written."""

    name = "io-error"
    requirements = Requirements(preloads=frozenset({Preload.FIU}))

    async def inject(self) -> str:
        self._node = node = await self.some_node()
        self.cluster.processes[node].expected_codes = FAILED_DISK_CODES
        self.cluster.io_errors.add(node)
        await self.enable(node, WRITING_CALLS + SYNCING_CALLS, FAILURE_PROBABILITY, errno.EIO)
        return f"{node}: EIO on {FAILURE_PROBABILITY:.0%} of writes and syncs"

    async def effect(self) -> str:
        process = self.cluster.processes[self._node]
        now = asyncio.get_running_loop().time
        deadline = now() + HALT_TIMEOUT_S
        growths = last_index = others_index = others_before = 0
        while await process.wait(POLL_S) is None:
            indexes = {node: status.last_log_index
                       for node, status in (await self.cluster.statuses()).items()}
            own_index = indexes.pop(self._node, 0)
            others_index = max((others_index, *indexes.values()))
            if own_index > last_index:
                # The first one is where it stands.
                growths += last_index > 0
                last_index, others_before = own_index, others_index
            others_before = others_before or others_index
            if growths >= GROWTHS_AT_MOST:
                raise Violation(f"{self._node} runs on with I/O errors: its log grew {growths} "
                                "times")
            if now() > deadline:
                if others_index - others_before >= ENTRIES_AT_MOST:
                    raise Violation(f"{self._node} neither ended nor followed with I/O errors: "
                                    f"the others logged {others_index - others_before} entries "
                                    "meanwhile")
                raise NotNow("no call that mattered failed")
        return self.ending()

    async def heal(self) -> None:
        # A new process has no failures enabled. One that survived its errors starts anew as well.
        for process in self.cluster.processes.values():
            if process.expected_codes:
                await process.kill()
        await self.restart_all()


class Wipe(Fault):
    """One node loses its disk and comes back with an empty one, under the same name."""

    name = "wipe"
    must_settle = True

    async def inject(self) -> str:
        self.returned = node = await self.some_node()
        await self.cluster.processes[node].kill()
        await asyncio.to_thread(self.cluster.take_disk_away, node)
        await self.cluster.restart(node)
        return f"{node} lost its disk"

    async def heal(self) -> None:
        await self.restart_all()


class OldDisk(Fault):
    """One node's disk is copied, the node runs on, and then gets the copy back."""

    name = "old-disk"
    must_settle = True

    async def inject(self) -> str:
        self.returned = node = await self.some_node()
        process = self.cluster.processes[node]
        await process.kill()
        old: Path = await asyncio.to_thread(self.cluster.copy_disk, node)
        await self.cluster.restart(node)
        ahead = await self._run_ahead(node)
        await process.kill()
        await asyncio.to_thread(self.cluster.put_disk_back, node, old)
        await self.cluster.restart(node)
        return f"{node} got its old disk, at least {ahead} entries behind"

    async def _run_ahead(self, node: str) -> int:
        """Let the node write more than the copy has; at least how many entries. Raises `NotNow`
        when it does not."""
        statuses = await self.cluster.statuses()
        copied = max((status.last_log_index for status in statuses.values()), default=0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AHEAD_TIMEOUT_S):
                while True:
                    status = (await self.cluster.statuses()).get(node)
                    if status is not None and copied and status.applied_index > copied:
                        await asyncio.sleep(AHEAD_S)
                        return status.applied_index - copied
                    await asyncio.sleep(POLL_S)
        raise NotNow(f"{node} did not get ahead of its old disk")

    async def heal(self) -> None:
        await self.restart_all()
