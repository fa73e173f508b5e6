"""The root command and the one place where errors become exit codes.

Sub-commands are loaded when they are used: `elastickv node` must not pay for the client library,
nor `elastickv client` for the node.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from elastickv import __version__
from elastickv.cli.exit_codes import INTERRUPTED
from elastickv.errors import ElasticKVError, ExitCode


class LazyCommand(NamedTuple):
    """Where a sub-command lives; `help` is its line in `elastickv --help`."""

    module: str
    attribute: str
    help: str


COMMANDS: dict[str, LazyCommand] = {
    "node": LazyCommand("elastickv.cli.node", "node", "Run one node of a cluster."),
    "doctor": LazyCommand("elastickv.cli.doctor", "doctor",
                          "Check whether a node may start."),
    "client": LazyCommand("elastickv.cli.client", "client", "Read and write keys."),
    "admin": LazyCommand("elastickv.cli.admin", "admin", "Operate encryption and Raft."),
    "certs": LazyCommand("elastickv.cli.certs", "certs", "Make the cluster's certificates."),
    "local-cluster": LazyCommand("elastickv.cli.local_cluster", "local_cluster",
                                 "Run a whole cluster on this machine."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        command = getattr(importlib.import_module(lazy.module), lazy.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{lazy.module}.{lazy.attribute} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="elastickv")
def cli() -> None:
    """An encrypted, Raft-replicated key-value store."""


def report(error: ElasticKVError) -> int:
    """Print a typed error as one line on stderr; its exit code."""
    line = " ".join(str(error).split())
    # The exit code says it where stderr cannot. Without stderr, print would write to stdout.
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"elastickv: {line}", file=sys.stderr, flush=True)
    return int(error.exit_code)


def run(arguments: Sequence[str] | None = None, command: click.Command = cli,
        **context: Any) -> int:
    """Run `command` and return the process exit code. Typed errors are reported on stderr."""
    try:
        result = command.main(args=arguments, prog_name="elastickv", standalone_mode=False,
                              **context)
    except click.ClickException as error:
        with contextlib.suppress(OSError, ValueError):
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except ElasticKVError as error:
        return report(error)
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`).
        _discard_stdout()
        return int(ExitCode.ERROR)
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _discard_stdout()
            return report(ElasticKVError(f"the output cannot be written: {error.strerror}"))
        raise
    return result if isinstance(result, int) else int(ExitCode.OK)


def _discard_stdout() -> None:
    from elastickv.cli.output import discard_stdout

    discard_stdout()


def main() -> None:
    """Entry point of the `elastickv` script."""
    open_missing_standard_files()
    # gRPC's own lines, one for each attempt, would drown the one that says what is wrong.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Keys and values are printed as UTF-8, whatever the locale is; a path as it is.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    code = run()
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        # Python's own flush at exit would fail as well, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(code)


def open_missing_standard_files() -> None:
    """Let no file that is opened later be taken for stdin, stdout or stderr by whatever writes to
    descriptor 2 without asking."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
