"""`elastickv client`: read and write keys."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from elastickv.cli import values
from elastickv.cli.connection import Connection, command
from elastickv.cli.output import (
    JSON,
    TABLE,
    display_bytes,
    emit,
    emit_bytes,
    emit_change,
    print_table,
    progress,
)
from elastickv.client import Client, Condition, Delete, Pair, Put, WriteResult
from elastickv.errors import ConfigError, ExitCode

SCAN_PAGE = 1000


@click.group()
def client() -> None:
    """Read and write keys.

    Keys and values are text, or base64:... for any bytes. Data goes to stdout.
    """


@command(client, "put", "elastickv client put greeting hello")
@click.argument("key")
@click.argument("value", required=False)
@click.option("--value-file", type=click.Path(path_type=Path), metavar="<path>",
              help="Read the value from a file; - is stdin.")
@click.option("--ttl-ms", default=0, metavar="<ms>", type=click.IntRange(0, (1 << 63) - 1),
              help="Expire after this time; 0 = never.")
def put(connection: Connection, key: str, value: str | None, value_file: Path | None, ttl_ms: int,
        output: str) -> None:
    """Write VALUE, or stdin if VALUE is -, under KEY."""
    name = values.parse_bytes(key, "the key")
    content = values.read_value(value, value_file)
    result = connection.run(lambda api: api.put(name, content, ttl_ms=ttl_ms))
    show_write(result, output)


def show_write(result: WriteResult, output: str, **more: object) -> None:
    """Where a write was applied and at which timestamp."""
    text = timestamp_text(result.commit_ts) if output == JSON else {}
    emit_change({**result._asdict(), **text, **more}, output,
                f"the write was applied at index {result.commit_index}")


def timestamp_text(commit_ts: int) -> dict[str, str]:
    """The JSON field of a timestamp for programs whose numbers have 53 bits."""
    return {"commit_ts_text": str(commit_ts)}


@command(client, "get", "elastickv client get greeting")
@click.argument("key")
@click.option("--raw", is_flag=True, help="Write the value's bytes and nothing else.")
@click.option("--ts", default=0, metavar="<timestamp>", type=click.IntRange(0, (1 << 64) - 1),
              help="Read as of this commit timestamp; 0 = latest.")
@click.option("--stale", is_flag=True, help="Let the member answer without asking a quorum.")
def get(connection: Connection, key: str, raw: bool, ts: int, stale: bool, output: str) -> int:
    """Print the value of KEY. Exit code 1 if there is none."""
    if raw and output == JSON:
        raise ConfigError("--raw contradicts --output json", remedy="give one of them")
    name = values.parse_bytes(key, "the key")
    result = connection.run(lambda api: api.get(name, ts=ts, stale=stale))
    if output == JSON:
        emit({**values.described("key", name), "exists": result.exists,
              **values.described("value", result.value), "commit_ts": result.commit_ts,
              **timestamp_text(result.commit_ts), "read_at_index": result.read_at_index,
              "ttl_ms": result.ttl_ms,
              **({"stale_ms": result.stale_ms} if stale else {})}, output)
        return int(ExitCode.OK if result.exists else ExitCode.ERROR)
    if stale:
        progress(staleness(result.stale_ms))
    if not result.exists:
        progress("not found")
    elif raw:
        emit_bytes(result.value)
    else:
        emit(result.value, output)
    return int(ExitCode.OK if result.exists else ExitCode.ERROR)


def staleness(stale_ms: int) -> str:
    """The age of a stale read in words."""
    if stale_ms < 0:
        return "stale read: this member was never known to have everything"
    return f"stale read: this member was known to have everything {stale_ms} ms ago"


@command(client, "delete", "elastickv client delete greeting")
@click.argument("key")
def delete(connection: Connection, key: str, output: str) -> None:
    """Remove KEY. Removing an absent key succeeds."""
    name = values.parse_bytes(key, "the key")
    show_write(connection.run(lambda api: api.delete(name)), output)


@command(client, "scan", "elastickv client scan --prefix user/ --limit 10")
@click.option("--start", default="", metavar="<key>", help="First key; default: the first of all.")
@click.option("--end", default="", metavar="<key>", help="Key to stop before; default: none.")
@click.option("--prefix", default="", metavar="<text>", help="Only keys that start with this.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=1),
              help="Most pairs to print.")
@click.option("--reverse", is_flag=True, help="From the end.")
@click.option("--keys-only", is_flag=True, help="No values.")
@click.option("--ts", default=0, metavar="<timestamp>", type=click.IntRange(0, (1 << 64) - 1),
              help="Read as of this commit timestamp; 0 = latest.")
@click.option("--stale", is_flag=True, help="Let the member answer without asking a quorum.")
def scan(connection: Connection, start: str, end: str, prefix: str, limit: int, reverse: bool,
         keys_only: bool, ts: int, stale: bool, output: str) -> None:
    """Print keys and values in key order.

    When more follow than --limit, a line on stderr says how to go on.
    """
    if prefix and (start or end):
        raise ConfigError("--prefix contradicts --start and --end", remedy="give one or the other")
    first = values.parse_bytes(prefix or start, "--start")
    last = values.prefix_end(first) if prefix else values.parse_bytes(end, "--end")

    async def pages(api: Client) -> tuple[list[Pair], int]:
        found: list[Pair] = []
        ages: list[tuple[float, int]] = []
        now = asyncio.get_running_loop().time
        with progress_bar(limit, "scanned", shown=limit > SCAN_PAGE) as advance:
            # One more than is printed tells whether any follow.
            async for page in api.scan_pages(first, last, page=min(limit + 1, SCAN_PAGE), ts=ts,
                                             reverse=reverse, keys_only=keys_only, stale=stale,
                                             on_stale_ms=lambda age: ages.append((now(), age))):
                found += page
                advance(len(page))
                if len(found) > limit:
                    break
        return found, oldest_ms(ages, now())

    found, stale_ms = connection.run(pages)
    if stale:
        progress(staleness(stale_ms))
    show_pairs(found[:limit], keys_only, output)
    if len(found) > limit:
        if reverse:
            last = found[limit - 1].key
        else:
            first = found[limit].key
        progress("more keys follow: raise --limit, or go on with " + range_options(first, last)
                 + (" instead of --prefix" if prefix else ""))


def oldest_ms(ages: Sequence[tuple[float, int]], now_s: float) -> int:
    """How old the oldest of several answers is at `now_s`; `ages` has when each came, and its
    `stale_ms` then. -1 if that is not known of each."""
    if any(stale_ms < 0 for _, stale_ms in ages):
        return -1
    return max(stale_ms + math.ceil((now_s - at_s) * 1000) for at_s, stale_ms in ages)


def range_options(first: bytes, last: bytes) -> str:
    """What selects a range, ready for a shell."""
    bounds = {"--start": first, "--end": last}
    return " ".join(f"{option} {shlex.quote(display_bytes(bound))}"
                    for option, bound in bounds.items() if bound)


def show_pairs(pairs: Sequence[Pair], keys_only: bool, output: str) -> None:
    """Pairs as a table or as one JSON document."""
    if output == JSON:
        emit([{**values.described("key", pair.key),
               **({} if keys_only else values.described("value", pair.value))}
              for pair in pairs], output)
        return
    rows = [{"key": pair.key} if keys_only else pair._asdict() for pair in pairs]
    emit(rows, TABLE, table=lambda: print_table(rows, ["key"] if keys_only else ["key", "value"]))


@command(client, "batch", "elastickv client batch put a 1 put b 2 delete c --if a=0")
@click.argument("operations", nargs=-1)
@click.option("--file", "path", type=click.Path(path_type=Path), metavar="<path>",
              help='JSON lines such as {"op": "put", "key": "a", "value": "1"}; - is stdin.')
@click.option("--if", "conditions", multiple=True, metavar="<key>=<commit ts>",
              help="Only if that is the key's latest commit timestamp (0 = absent). Repeatable.")
@click.option("--chunk", default=0, metavar="<count>", type=click.IntRange(0, 10_000),
              help="Apply this many operations at a time, each chunk atomic on its own; "
                   "0 = all in one.")
def batch(connection: Connection, operations: tuple[str, ...], path: Path | None,
          conditions: tuple[str, ...], chunk: int, output: str) -> None:
    """Apply OPERATIONS (put KEY VALUE, delete KEY) all together or not at all."""
    ops = batch_operations(operations, path)
    wanted = values.parse_conditions(conditions)
    if chunk and wanted:
        raise ConfigError("--chunk contradicts --if", remedy="a condition holds for one batch")
    size = chunk or max(1, len(ops))
    show_write(connection.run(lambda api: apply_chunks(api, ops, wanted, size)), output,
               operations=len(ops))


def batch_operations(words: Sequence[str], path: Path | None) -> list[Put | Delete]:
    """The operations of the arguments or of the file, not of both."""
    if bool(words) == (path is not None):
        raise ConfigError("give operations either as arguments or with --file",
                          remedy="for example: batch put a 1 put b 2 delete c")
    if path is None:
        return values.parse_operations(words)
    try:
        if str(path) == values.STDIN:
            return list(values.parse_lines(line.decode("utf-8") for line in values.stdin()))
        with path.open(encoding="utf-8") as lines:
            return list(values.parse_lines(lines))
    except OSError as error:
        raise ConfigError(f"--file: cannot read {path}: {error.strerror}",
                          remedy="name a readable file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--file: {path} is not UTF-8",
                          remedy="give unprintable bytes as base64:...") from None


async def apply_chunks(api: Client, ops: Sequence[Put | Delete], conditions: Sequence[Condition],
                       size: int) -> WriteResult:
    """Apply `ops`, `size` at a time; the last result. A failure or an interruption
    says how far it came."""
    result = WriteResult(0, 0)
    with progress_bar(len(ops), "written", shown=len(ops) > size) as advance:
        for first in range(0, max(1, len(ops)), size):
            part = ops[first:first + size]
            try:
                result = await api.batch(part, conditions=conditions)
            except BaseException as error:
                if first:
                    # Whoever interrupts does not learn what became of the chunk under way.
                    open_end = "" if isinstance(error, Exception) else (
                        f", the next {len(part)} may have been")
                    progress(f"the first {first} operations were applied{open_end}")
                raise
            advance(len(part))
    return result


@contextlib.contextmanager
def progress_bar(total: int, verb: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while a long command runs; nothing where stderr is no terminal."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield lambda count: None
        return
    with click.progressbar(length=total, label=verb, file=sys.stderr) as bar:
        yield bar.update
