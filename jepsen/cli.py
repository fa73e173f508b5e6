"""The command line of the harness."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jepsen.call_errors import check_errors
from jepsen.faults import FAULTS
from jepsen.history import pair, read_history
from jepsen.run import Outcome, Run, RunSettings, describe_problems
from jepsen.verdict import Validity, combine
from jepsen.workloads import WORKLOADS

ALL = "all"
SEED_LIMIT = 1_000_000
FIVE_NODE_FAULTS = frozenset({"kill-minority", "ring", "membership"})
"""What `all` shows with five nodes: with three, a minority is one node and a ring is everybody."""

OVERHEAD_S = 25.0
"""About what a run takes besides its load: start, recovery, final reads, checks."""

INTERRUPTED = 130
"""The exit code of a run that was ended from outside, as shells have it."""

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

BUDGET_S = 1680.0
SHORTEST_LOAD_S = 6.0


def parse_names(text: str, known: Sequence[str], what: str, *,
                may_be_none: bool = False) -> tuple[str, ...]:
    """A comma list of names, "all", or where there may be none "none". Raises `ValueError`."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if may_be_none and names == ("none",):
        return ()
    unknown = [name for name in names if name not in (*known, ALL)]
    if unknown or not names:
        raise ValueError(f"unknown {what} {', '.join(unknown) or repr(text)}; known: "
                         f"{', '.join(known)}, {ALL}")
    return tuple(known if ALL in names else dict.fromkeys(names))


def positive(text: str) -> float:
    """A finite number above zero, of the command line."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def count(text: str) -> int:
    """A whole number above zero, of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def pair_of(text: str) -> str:
    """NAME=VALUE, of the command line."""
    if not text.partition("=")[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return text


def launcher(text: str) -> tuple[str, ...]:
    """What follows the interpreter to start a node, of the command line: a script, or `-m` and a
    module, and arguments. Files are named as they are in any directory."""
    words = [text] if Path(text).is_file() else shlex.split(text)
    if not words or not (words[0].startswith("-") or Path(words[0]).is_file()):
        raise argparse.ArgumentTypeError(
            f"{text!r} begins with neither a Python file nor -m MODULE")
    return tuple(str(Path(word).absolute()) if Path(word).is_file() else word for word in words)


def build_parser() -> argparse.ArgumentParser:
    """All commands."""
    parser = argparse.ArgumentParser(
        prog="python -m jepsen", description="Break a real cluster and judge what clients saw.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one run")
    run.add_argument("--workload", default="register",
                     help=f"comma list of {', '.join(WORKLOADS)}, or all")
    run.add_argument("--faults", default="kill-one,partition-halves",
                     help=f"comma list of {', '.join(FAULTS)}; all mixes them; none")
    run.add_argument("--time", type=positive, default=60.0, help="seconds of load")
    run.add_argument("--seed", type=int, help="repeats the choices of a run")
    run.add_argument("--nodes", type=int, choices=(3, 5), default=3)
    run.add_argument("--rate", type=positive, default=150.0, help="operations per second")
    run.add_argument("--concurrency", type=count, default=10,
                     help="clients per workload that write; one more per node only reads")
    every = commands.add_parser("all", help="every workload with every fault package")
    every.add_argument("--budget", type=positive, default=BUDGET_S,
                       help="seconds that all runs together may take")
    every.add_argument("--seed", type=int, help="seed of the first run")
    again = commands.add_parser("check", help="judge a history that is on disk")
    again.add_argument("--workload", required=True, choices=tuple(WORKLOADS))
    again.add_argument("history", type=Path, help="a file like history-<workload>.jsonl")
    for command in (run, every):
        command.add_argument("--out", type=Path, help="run directory, made anew")
        command.add_argument("--network", choices=("auto", "namespaces", "proxy"), default="auto")
        command.add_argument("--launcher", type=launcher, metavar="FILE|-m MODULE",
                             help="starts a node, instead of -m elastickv")
        command.add_argument("--environment", action="append", default=[], metavar="NAME=VALUE",
                             type=pair_of,
                             help="set for the nodes only")
    return parser


def settings_of(arguments: argparse.Namespace, directory: Path) -> RunSettings:
    """The run that the arguments of `run` describe. Raises `ValueError`."""
    extra = {}
    if arguments.launcher is not None:
        extra["launcher"] = (sys.executable, *arguments.launcher)
    faults = parse_names(arguments.faults, tuple(FAULTS), "fault", may_be_none=True)
    return RunSettings(
        workloads=parse_names(arguments.workload, tuple(WORKLOADS), "workload"), faults=faults,
        duration_s=arguments.time, seed=arguments.seed, node_count=arguments.nodes,
        directory=directory, network=arguments.network, rate=arguments.rate,
        concurrency=arguments.concurrency, every_fault_must_happen=faults != tuple(FAULTS),
        environment=dict(each.split("=", 1) for each in arguments.environment), **extra)


def make_run_directory(out: Path | None, name: str, root: Path = Path("runs")) -> Path:
    """Make `out`, or else a directory under `root` that is named by time; of runs of the same
    second, all but the first have a number as well. Raises `ValueError`."""
    stamped = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    path = out or stamped
    numbers = itertools.count(2)
    while not make_directory(path):
        if out is not None:
            raise ValueError(f"{out} exists already")
        path = stamped.with_name(f"{stamped.name}-{next(numbers)}")
    return path


def make_directory(path: Path) -> bool:
    """Make a directory; False when something is there already. Raises `ValueError`."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return True


def execute(settings: RunSettings) -> Outcome:
    """Run once and print what came of it; the line with the verdict comes last."""
    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # who reads has gone; the run directory has it all
            print(text, flush=True)

    say(f"seed {settings.seed}, {settings.node_count} nodes, "
        f"workload {','.join(settings.workloads)}, faults {','.join(settings.faults) or 'none'}, "
        f"{settings.duration_s:g} s, in {settings.directory}")

    async def run() -> Outcome:
        task = asyncio.current_task()
        if task is not None:
            # Ended from outside, everything is taken down; a second signal does not hinder that.
            for number in ENDING_SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup's is not to end
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await Run(settings, say).execute()

    outcome = asyncio.run(run())
    for line in (*describe_problems(outcome), outcome.summary.line()):
        say(line)
    return outcome


def run_all(arguments: argparse.Namespace) -> int:
    """One run per fault package, each with every workload at once on the same cluster.

    Each load is as long as the rest of the budget allows, going by what the runs took so far.
    """
    root = arguments.out
    begin = time.monotonic()
    loaded_s = 0.0
    rows: list[dict[str, object]] = []
    for number, fault in enumerate(FAULTS):
        spent_s = time.monotonic() - begin
        overhead_s = (spent_s - loaded_s) / number if number else OVERHEAD_S
        duration_s = load_time_s(arguments.budget - spent_s, len(FAULTS) - number, overhead_s)
        loaded_s += duration_s
        run_arguments = argparse.Namespace(
            **vars(arguments) | {
                "workload": ALL, "faults": fault, "time": duration_s, "rate": 250.0,
                "concurrency": 4, "seed": arguments.seed + number,
                "nodes": 5 if fault in FIVE_NODE_FAULTS else 3})
        line, validity = execute_one_of_many(settings_of(run_arguments, root / fault))
        rows.append({"fault": fault, "seed": run_arguments.seed, "line": line,
                     "verdict": validity.value})
        if validity is Validity.VALID:
            for bulky in ("cluster", "old-disks", "taps"):
                shutil.rmtree(root / fault / bulky, ignore_errors=True)
        (root / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['fault']:18} {row['verdict']}")
    print(f"{len(rows)} packages in {(time.monotonic() - begin) / 60:.1f} minutes, in {root}")
    return 0 if all(row["verdict"] == Validity.VALID.value for row in rows) else 1


def execute_one_of_many(settings: RunSettings) -> tuple[str, Validity]:
    """`execute`; a run that breaks down has shown nothing, and the others go on."""
    try:
        summary = execute(settings).summary
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}", Validity.UNKNOWN
    return summary.line(), summary.validity


def check_file(workload: str, path: Path) -> int:
    """Judge a history that is on disk; the exit code. Raises `ValueError` when it is none."""
    try:
        history = read_history(path, lambda line: print(
            "the last line is torn, as by a run that was killed, and left out: "
            f"{line[:160]}"))
        # Which faults there were is not in a history; any of them may explain an error.
        verdicts = [WORKLOADS[workload]().check(history), check_errors(pair(history), FAULTS)]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"{path} is no history of the workload {workload}") from None
    for verdict in verdicts:
        for problem in verdict.problems:
            print(f"{verdict.checker}: {problem}")
    validity = combine(verdicts)
    print(f"verdict: {validity}")
    return 0 if validity is Validity.VALID else 1


def load_time_s(left_s: float, runs: int, overhead_s: float) -> float:
    """How long the next of `runs` loads may be so that all of them end within `left_s`."""
    return max(SHORTEST_LOAD_S, left_s / runs - overhead_s)


@contextlib.contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn a `ValueError` about the arguments into exit code 2."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 only when everything that was run is valid."""
    try:
        return dispatch(argv)
    except (KeyboardInterrupt, asyncio.CancelledError):
        for number in ENDING_SIGNALS:  # a second one changes nothing, not even the exit code
            signal.signal(number, signal.SIG_IGN)
        print("interrupted: nodes, networks and mounts are taken down, nothing was judged",
              file=sys.stderr)
        return INTERRUPTED


def dispatch(argv: Sequence[str]) -> int:
    """`main`, but for what ends it from outside."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        with usage_errors(parser):
            return check_file(arguments.workload, arguments.history)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(SEED_LIMIT)
    if arguments.command == ALL:
        with usage_errors(parser):
            arguments.out = make_run_directory(arguments.out, ALL)
        return run_all(arguments)
    with usage_errors(parser):
        # Nothing is made for arguments that are refused.
        settings = settings_of(arguments, Path())
        settings = replace(settings, directory=make_run_directory(
            arguments.out, arguments.workload.replace(",", "+")))
    outcome = execute(settings)
    return 0 if outcome.summary.validity is Validity.VALID else 1
