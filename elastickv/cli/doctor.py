"""`elastickv doctor`: what a node checks at its start, without starting it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import click

from elastickv import config, hygiene
from elastickv.cli.node import setting_options
from elastickv.cli.output import emit, output_option, print_table
from elastickv.config import NodeSettings, TlsFiles
from elastickv.errors import ConfigError, ExitCode
from elastickv.keys.guards import Status, Verdict


@click.command(short_help="Check whether a node may start.",
               epilog="\b\nExample:\n  elastickv doctor --config /etc/elastickv/node.toml")
@click.option(config.CONFIG_FLAG, "config_path", default="", metavar="<path>",
              help="TOML file whose keys are the kebab-case flag names. "
                   f"[{config.CONFIG_VARIABLE}]")
@setting_options
@output_option
def doctor(config_path: str, output: str, **options: str | None) -> int:
    """Check what a node checks at its start, without starting it, and say what each check came to.

    Takes the settings of `elastickv node`; run it as the node's user. Changes nothing: only the
    file-system guard writes, a file that it removes. Exit code 0: no check fails; 1: one does. The
    log is not read and no port is tried, so that a node may still find damage in the one or the
    other taken. While a node runs on the directory, `data-directory` fails and the others judge
    what is on its disk.
    """
    hygiene.disable_core_dumps()  # before a key is read
    flags = {name: text for name, text in options.items() if text is not None}
    return show(verdicts(config.load(flags, os.environ, config_path), flags), output)


def verdicts(settings: NodeSettings, flags: Mapping[str, str]) -> list[Verdict]:
    """Gather the facts and judge them. `flags` are those that were given."""
    # Imported here: they bring the store with them.
    from elastickv import startup
    from elastickv.durable import OsDisk
    from elastickv.keys.guards import run_guards

    results = run_guards(startup.examine(settings, OsDisk()))
    results += startup.later_verdicts(settings, OsDisk())
    if settings.tls is not None:
        results.append(_tls_files(settings.tls, settings.raft_id, settings.address.host, flags))
    return results


def _tls_files(files: TlsFiles, raft_id: str, host: str, flags: Mapping[str, str]) -> Verdict:
    from elastickv.certs import check_node_files, uncovered_host

    try:
        check_node_files(files, raft_id)
        problem = uncovered_host(files, host)
    except ConfigError as error:
        error = config.naming_variables(error, flags, os.environ)
        return Verdict("tls-files", Status.FAIL, error.message, error.remedy)
    if problem:
        return Verdict("tls-files", Status.WARN, problem,
                       f"make one with `elastickv certs node {raft_id} --host {host}`, unless"
                       " clients reach the node under another name")
    return Verdict("tls-files", Status.PASS)


def show(results: Sequence[Verdict], output: str) -> int:
    """Print the verdicts; the exit code."""
    failed = [verdict for verdict in results if verdict.status is Status.FAIL]
    rows = [{"guard": verdict.guard, "result": verdict.status.value, "problem": verdict.message,
             "remedy": verdict.remedy} for verdict in results]

    def table() -> None:
        print_table(rows, ("guard", "result"))
        for verdict in results:
            if not verdict.message:
                continue
            click.echo(f"\n{verdict.guard}: {verdict.message}\n  Remedy: {verdict.remedy}")

    emit({"may_start": not failed, "guards": rows}, output, table=table)
    return int(ExitCode.ERROR if failed else ExitCode.OK)
