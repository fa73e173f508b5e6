"""`elastickv local-cluster`: a whole encrypted cluster on this machine, in the foreground.

This is what `make run` runs. It starts real node processes, turns encryption on, prints what to
type next, and stays up until Ctrl-C or SIGTERM. Running it again goes on with the same data.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import click

from elastickv.cli import exit_codes
from elastickv.cli.local_api import ClusterApi, NodeView
from elastickv.cli.local_processes import (
    CLIENT_NAME,
    Layout,
    NodeProcess,
    Shape,
    check_ports,
    exits,
    prepare,
    require_alive,
    start_all,
    stop_all,
)
from elastickv.cli.output import print_table, progress
from elastickv.errors import ExitCode, PeerError, Unreachable

READY_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.1

T = TypeVar("T")

@click.command("local-cluster")
@click.option("--nodes", default=3, show_default=True, type=click.IntRange(1, 9),
              help="How many nodes; fixed by the first run on a directory.")
@click.option("--data", default="data", show_default=True,
              type=click.Path(path_type=Path, file_okay=False),
              help="Where keys, certificates, data and logs are kept.")
@click.option("--client-port", default=50051, show_default=True, type=click.IntRange(1024, 65000),
              help="Client port of the first node; the others follow.")
@click.option("--raft-port", default=50151, show_default=True, type=click.IntRange(1024, 65000),
              help="Raft port of the first node; the others follow.")
def local_cluster(nodes: int, data: Path, client_port: int, raft_port: int) -> int:
    """Run a whole encrypted cluster on this machine until Ctrl-C.

    For trying things out: all nodes share one machine and one KEK file.
    """
    # SIGINT too: a shell starts background jobs with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    shape = Shape(nodes, client_port, raft_port)
    check_ports(Layout(data, shape))  # before the directory is bound to them
    layout, made = prepare(data, shape)
    for line in made:
        progress(f"made {line}")
    processes: list[NodeProcess] = []
    try:
        processes = start_all(layout)
        progress(f"starting {nodes} node(s)")
        with ClusterApi(layout.members, layout.tls(CLIENT_NAME)) as api:
            views = bring_up(api, layout, processes)
        show(layout, views)
        return watch(processes)
    except KeyboardInterrupt:
        return int(ExitCode.OK)  # that is how one ends it
    finally:
        stop(processes)


def bring_up(api: ClusterApi, layout: Layout, processes: Sequence[NodeProcess]) -> list[NodeView]:
    """Wait for every node, turn encryption on, and return what each member says afterwards."""
    for node in layout.nodes:
        eventually(f"{node.node_id} to be ready", processes,
                   partial(api.require_ready, node.address))
    eventually("encryption to be bootstrapped", processes, api.bootstrap)
    storage_index = eventually("the storage cutover", processes, api.enable_storage_envelope)
    raft_index = eventually("the raft cutover", processes, api.enable_raft_envelope)
    return [eventually(f"{node.node_id} to catch up", processes,
                       partial(api.view, node.address, storage_index, raft_index))
            for node in layout.nodes]


def eventually(what: str, processes: Sequence[NodeProcess], attempt: Callable[[], T]) -> T:
    """The result of `attempt`, repeated while it raises a `PeerError`, within READY_TIMEOUT_S.

    Every step here is idempotent, so that repeating is safe even when an outcome is unknown. Ends
    at once when a node process has ended.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        require_alive(processes)
        try:
            return attempt()
        except PeerError as error:
            if time.monotonic() > deadline:
                logs = ", ".join(str(process.node.log_path) for process in processes)
                raise Unreachable(f"waited {READY_TIMEOUT_S:.0f} s for {what}: {error.message}",
                                  remedy=f"see {logs}") from None
        time.sleep(POLL_INTERVAL_S)


def show(layout: Layout, views: Sequence[NodeView]) -> None:
    """The status table and the commands to try."""
    print_table([asdict(view) for view in views])
    click.echo(commands(layout))
    sys.stdout.flush()


def commands(layout: Layout) -> str:
    """What to type in another shell, ready to paste."""
    program = shlex.join(_program())
    data = shlex.quote(str(layout.root))
    return f"""
The cluster is up. In another shell:

  . {shlex.quote(str(layout.client_env))}
  {program} client put greeting "a phrase that is easy to find"
  {program} client get greeting
  grep -r "easy to find" {data} || echo "not on any disk"
  {program} admin encryption rotate-dek --purpose storage
  {program} admin encryption rotate-dek --purpose raft
  {program} admin encryption status
  {program} admin raft status

Logs: {layout.root}/n*/node.log. Ctrl-C stops the cluster; the next run goes on with its data.
"""


def _program() -> list[str]:
    """The command as the user can type it: relative to here where it is below here."""
    script = Path(sys.executable).parent / "elastickv"
    if not script.exists():
        return [sys.executable, "-m", "elastickv"]
    with contextlib.suppress(ValueError):
        return [str(script.relative_to(Path.cwd()))]
    return [str(script)]


def watch(processes: Sequence[NodeProcess]) -> int:
    """Report every node that ends; returns when none is left."""
    for process in exits(processes):
        progress(process.describe_exit())
        progress(process.log_tail())
    progress("no node is left")
    return int(ExitCode.ERROR)


def stop(processes: Sequence[NodeProcess]) -> None:
    """Stop every node that still runs and say how each ended. A second Ctrl-C changes nothing."""
    running = [process for process in processes if process.exit_code() is None]
    if not running:
        return
    with _interrupts_ignored():
        progress(f"\nstopping {len(running)} node(s)")
        for node_id, code in stop_all(running).items():
            progress(f"{node_id}: exit code {code} ({exit_codes.meaning(code)})")


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    previous = {number: signal.signal(number, signal.SIG_IGN)
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
