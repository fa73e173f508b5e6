"""`elastickv doctor`: every start-up guard of a node, without starting it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from elastickv import config
from elastickv.cli.node import setting_options
from elastickv.cli.output import emit, output_option, print_table
from elastickv.config import NodeSettings
from elastickv.errors import ElasticKVError, ExitCode
from elastickv.keys.guards import Status, Verdict


@click.command(short_help="Check whether a stopped node may start.",
               epilog="\b\nExample:\n  elastickv doctor --config /etc/elastickv/n1.toml")
@click.option(config.CONFIG_FLAG, "config_path", default="", metavar="<path>",
              help="TOML file whose keys are the kebab-case flag names. "
                   f"[{config.CONFIG_VARIABLE}]")
@setting_options
@output_option
def doctor(config_path: str, output: str, **options: str | None) -> int:
    """Run every start-up guard of a stopped node and say what each came to.

    Takes the settings of `elastickv node`. Changes nothing. Exit code 0: the node may start;
    1: a guard fails, or the node runs.
    """
    flags = {name: text for name, text in options.items() if text is not None}
    return show(verdicts(config.load(flags, os.environ, config_path)), output)


def verdicts(settings: NodeSettings) -> list[Verdict]:
    """Gather the facts under the data directory's lock and judge them."""
    # Imported here: they bring the store and the engine with them.
    from elastickv import startup
    from elastickv.durable import OsDisk
    from elastickv.keys.guards import run_guards
    from elastickv.node import AlreadyRunning, lock_data_directory

    descriptor = -1
    if settings.raft_data_dir.exists():
        try:
            descriptor = lock_data_directory(settings.raft_data_dir)
        except AlreadyRunning:
            raise ElasticKVError(
                f"a node runs on {settings.raft_data_dir}",
                remedy="stop it first, or ask it: elastickv admin encryption status") from None
    try:
        return run_guards(startup.examine(settings, OsDisk()))
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def show(results: Sequence[Verdict], output: str) -> int:
    """Print the verdicts; the exit code."""
    failed = [verdict for verdict in results if verdict.status is Status.FAIL]
    rows = [{"guard": verdict.guard, "result": verdict.status.value, "problem": verdict.message,
             "remedy": verdict.remedy} for verdict in results]

    def table() -> None:
        print_table(rows, ("guard", "result"))
        for verdict in failed:
            click.echo(f"\n{verdict.guard}: {verdict.message}\n  Remedy: {verdict.remedy}")

    emit({"may_start": not failed, "guards": rows}, output, table=table)
    return int(ExitCode.ERROR if failed else ExitCode.OK)
