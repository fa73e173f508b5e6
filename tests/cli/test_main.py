"""elastickv.cli.main: lazy loading, one line per typed error, exit codes."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from elastickv.cli import exit_codes
from elastickv.cli.main import COMMANDS, cli, report, run
from elastickv.errors import ConfigError, ExitCode, NoLeader, OutcomeUnknown


def test_help_lists_every_command_without_loading_it() -> None:
    code = ("import sys; from elastickv.cli.main import run; run(['--help']); "
            "loaded = [m for m in sys.modules if m.startswith('elastickv.cli.')]; "
            "print(sorted(loaded), 'grpc' in sys.modules, 'rich' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "['elastickv.cli.exit_codes', 'elastickv.cli.main'] False False")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_loads_and_has_help(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


@pytest.mark.parametrize(("error", "code"), [
    (ConfigError("bad flag", remedy="mend it"), ExitCode.USAGE),
    (NoLeader("nobody leads"), ExitCode.UNAVAILABLE),
    (OutcomeUnknown("who knows"), ExitCode.OUTCOME_UNKNOWN),
])
def test_typed_errors_are_one_line_and_an_exit_code(
        error: Exception, code: ExitCode, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def failing() -> None:
        raise error

    assert run([], command=failing) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"elastickv: {error}\n"


def test_a_message_of_several_lines_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report(ConfigError("first\nsecond\tthird"))
    assert capsys.readouterr().err == "elastickv: first second third\n"


@pytest.mark.parametrize(("arguments", "code"), [
    (["--version"], ExitCode.OK), (["no-such-command"], ExitCode.USAGE),
    (["node", "--no-such-flag"], ExitCode.USAGE), (["node"], ExitCode.USAGE)])
def test_exit_codes_of_the_root(arguments: list[str], code: ExitCode) -> None:
    assert run(arguments) == code


def test_a_command_that_returns_a_code_sets_it() -> None:
    @click.command()
    def command() -> int:
        return 4

    assert run([], command=command) == 4


def test_interrupt() -> None:
    @click.command()
    def command() -> None:
        raise KeyboardInterrupt

    assert run([], command=command) == exit_codes.INTERRUPTED


def test_a_defect_is_not_swallowed() -> None:
    @click.command()
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([], command=command)


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m elastickv node --help | head -1"],
        capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_every_exit_code_has_a_meaning() -> None:
    assert set(ExitCode) <= set(exit_codes.MEANINGS)
    assert exit_codes.meaning(-9) == "killed by SIGKILL"
    assert exit_codes.meaning(77) == "unknown exit code"
