"""`--output table|json` for every command: data on stdout, progress and warnings on stderr.

JSON is one document, for programs: names do not change between releases. Tables are for people.
`bytes` are shown as text where they are printable UTF-8 and as base64 otherwise; in JSON they are
always base64, so that a program never has to guess.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from elastickv.errors import ElasticKVError

TABLE = "table"
JSON = "json"
ENCODED = "base64:"
"""Before bytes that are not shown as text."""
_UNBOUNDED = 1 << 20
_BREAKS = re.compile(r"[\t\r\n]+")

Row = Mapping[str, object]


def output_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--output table|json`, passed on as `output`."""
    return click.option("--output", type=click.Choice([TABLE, JSON]), default=TABLE,
                        show_default=True, help="How to print the result.")(function)


def emit(document: object, output: str, *, table: Callable[[], None] | None = None) -> None:
    """Print a result: `document` as JSON, or by calling `table` (default: by its shape). Raises
    `ElasticKVError` where stdout cannot be written, `BrokenPipeError` where nobody reads it."""
    try:
        if output == JSON:
            click.echo(to_json(document))
        elif table is not None:
            table()
        elif isinstance(document, Mapping):
            print_fields(document)
        elif isinstance(document, Sequence) and not isinstance(document, str | bytes):
            print_table(document)
        else:
            click.echo(cell(document))
    except BrokenPipeError:
        discard_stdout()
        raise
    except OSError as error:
        discard_stdout()
        raise ElasticKVError(f"the output cannot be written: {error.strerror}") from None


def emit_change(document: object, output: str, done: str, *,
                table: Callable[[], None] | None = None) -> None:
    """`emit` of what a change came to. Where that cannot be printed, `done` says on stderr that the
    change was made: an error would say that it was not."""
    try:
        emit(document, output, table=table)
    except (BrokenPipeError, ElasticKVError):
        progress(f"{done}; its result could not be printed")


def emit_bytes(content: bytes) -> None:
    """`emit` of bytes as they are."""
    def write() -> None:
        if sys.stdout is not None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()

    emit(content, TABLE, table=write)


def discard_stdout() -> None:
    """Let nothing more be written. Python's own flush at exit would fail as well, and change the
    exit code."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(message: str) -> None:
    """One line for the person who waits, on stderr. Never an error, which would hide a result or
    another error."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(message, err=True)


def to_json(document: object) -> str:
    """`document` as indented JSON; bytes become base64, enums their names."""
    return json.dumps(plain(document), indent=2, ensure_ascii=False)


def plain(value: object) -> object:
    """Only what JSON knows. Integers stay exact; mappings get text keys."""
    match value:
        case enum.Enum():
            return value.name.lower()
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(bytes(value)).decode("ascii")
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case tuple() if hasattr(value, "_asdict"):
            return {key: plain(item) for key, item in value._asdict().items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)


def cell(value: object) -> str:
    """One value as text for a table."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case enum.Enum():
            return value.name.lower()
        case bytes() | bytearray() | memoryview():
            return display_bytes(bytes(value))
        case list() | tuple() | set() | frozenset():
            return ", ".join(cell(item) for item in value) or "-"
        case _:
            return str(value)


def text_of(value: bytes) -> str | None:
    """`value` as text if all of it is printable UTF-8, else None."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def display_bytes(value: bytes) -> str:
    """Printable UTF-8 as it is, anything else as `base64:...`; never a control character.

    Text that itself begins with `base64:` is encoded too, so that the two cannot be confused.
    """
    text = text_of(value)
    if text is not None and not text.startswith(ENCODED):
        return text
    return ENCODED + base64.b64encode(value).decode("ascii")


def print_table(rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Rows as a table on stdout. `columns` selects and orders; default: those of the first row.

    On a terminal it is boxed, or, where it is too narrow for that, one record follows the other;
    into a pipe it is tab-separated with a header line, ready for cut and awk.
    """
    names = list(columns) or (list(rows[0]) if rows else [])
    cells = [[cell(row.get(name)) for name in names] for row in rows]
    if sys.stdout is None or not sys.stdout.isatty():
        if names:
            click.echo("\t".join(names))
        for line in cells:
            click.echo("\t".join(_BREAKS.sub(" ", text) for text in line))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in names:
        table.add_column(name.replace("_", " "), overflow="fold")
    for line in cells:
        table.add_row(*line)
    console = Console(markup=False, highlight=False, emoji=False)
    unbounded = console.options.update(max_width=_UNBOUNDED)
    if rows and console.measure(table, options=unbounded).maximum > console.width:
        _print_records(names, rows)
    else:
        console.print(table)


def _print_records(names: Sequence[str], rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        if number:
            click.echo()
        print_fields({name: row.get(name) for name in names})


def print_fields(fields: Row) -> None:
    """One record as `name: value` lines, names padded to one width."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {cell(value)}")
