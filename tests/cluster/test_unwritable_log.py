"""A node whose stderr takes nothing, as on a full disk or with nobody at the other end of the pipe:
it serves, stops and refuses as any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from elastickv.errors import ExitCode
from tests.cluster.cluster import Cluster, NodeProcess

pytestmark = [pytest.mark.cluster]

FULL = ["sh", "-c", 'exec "$@" 2> /dev/full', "sh"]
CLOSED = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
NO_READER = [sys.executable, "-c", """
import os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
os.execvp(sys.argv[1], sys.argv[1:])
"""]
STALLED = [sys.executable, "-c", """
import os, sys
reader, writer = os.pipe()
os.set_inheritable(reader, True)
os.set_blocking(writer, False)
try:
    while True:
        os.write(writer, bytes(1000))
except BlockingIOError:
    os.set_blocking(writer, True)
os.dup2(writer, 2)
os.execvp(sys.argv[1], sys.argv[1:])
"""]
LAUNCHERS = pytest.mark.parametrize("launcher", [FULL, CLOSED, NO_READER, STALLED], ids=[
    "full disk", "closed", "no reader", "a reader that does not read"])


def command(launcher: Sequence[str], arguments: Sequence[str]) -> list[str]:
    return [*launcher, sys.executable, "-m", "elastickv", "node", *arguments]


def start(node: NodeProcess, launcher: Sequence[str]) -> None:
    node.process = subprocess.Popen(command(launcher, [*node.arguments, "--log-level", "debug"]),
                                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@LAUNCHERS
async def test_a_node_that_cannot_log_serves_and_stops_in_order(
        one_member: Cluster, launcher: list[str]) -> None:
    node = one_member.nodes["n1"]
    start(node, launcher)
    await one_member.ready("n1")
    await one_member.encrypt()
    async with one_member.client() as client:
        await client.put(b"k", b"v")
        assert (await client.get(b"k")).value == b"v"
    assert node.kill(signal.SIGTERM) == ExitCode.OK


@LAUNCHERS
def test_the_exit_code_says_what_stderr_cannot(one_member: Cluster, launcher: list[str]) -> None:
    arguments = [*one_member.nodes["n1"].arguments]
    arguments[arguments.index("--kekFile") + 1] = os.devnull
    done = subprocess.run(command(launcher, arguments), stdout=subprocess.PIPE, timeout=60,
                          check=False)
    assert done.returncode == ExitCode.STARTUP_REFUSED
    assert done.stdout == b""
