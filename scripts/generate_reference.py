"""Write the pages of docs that follow from the code: the reference and the life cycles.

`pages()` gives every page as text; a test compares them with the files, so that a flag, an error or
an exit code cannot be added without its documentation.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Sequence
from pathlib import Path

import click
import life_cycles

import elastickv
from elastickv import config, errors
from elastickv.cli import exit_codes
from elastickv.cli.main import cli
from elastickv.cli.node import metavar
from elastickv.config import Kind, Setting
from elastickv.errors import ElasticKVError
from elastickv.metrics import CATALOGUE, PREFIX

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- Generated from the code by `make reference`. Do not edit. -->\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def flags_page() -> str:
    """Every setting of `elastickv node`."""
    def limits(setting: Setting) -> str:
        return f" From {setting.minimum} to {setting.maximum}." if setting.kind is Kind.INT else ""

    rows = [[
        "<br>".join(f"`{flag}`" for flag in setting.flags),
        f"`{setting.variable}`",
        f"`{setting.key}`",
        f"`{metavar(setting)}`",
        "required" if setting.required else f"`{setting.default}`" if setting.default else "none",
        setting.help + limits(setting),
    ] for setting in config.SETTINGS]
    return (
        f"{NOTE}\n# Settings of a node\n\n"
        "`elastickv node` takes every setting as a flag, as an environment variable, or from the "
        f"TOML file that `{config.CONFIG_FLAG} <path>` or `{config.CONFIG_VARIABLE}` names. A flag "
        "wins over a variable, a variable over the file, the file over the default. An "
        "empty variable counts as not set. Unknown keys in the file are refused. A boolean flag "
        "may be given a value: `--encryption-enabled=false`.\n\n"
        + table(["flag", "variable", "key in the file", "value", "default", "meaning"], rows)
        + "\n```toml\n# node.toml\nraft-id = \"n1\"\naddress = \"10.0.0.1:50051\"\n"
          "raft-address = \"10.0.0.1:50151\"\nraft-data-dir = \"/var/lib/elastickv\"\n"
          "# for the first start only\n"
          "raft-bootstrap-members = [\"n1=10.0.0.1:50151\", \"n2=10.0.0.2:50151\", "
          "\"n3=10.0.0.3:50151\"]\nkek-file = \"/etc/elastickv/kek.key\"\n"
          "encryption-enabled = true\ntls-cert = \"/etc/elastickv/n1.crt\"\n"
          "tls-key = \"/etc/elastickv/n1.key\"\ntls-ca = \"/etc/elastickv/ca.crt\"\n```\n")


def exit_codes_page() -> str:
    """Every process exit code."""
    rows = [[str(int(code)), what, action]
            for code, (what, action) in sorted(exit_codes.MEANINGS.items())]
    return (f"{NOTE}\n# Exit codes\n\nThe same for every `elastickv` command.\n\n"
            + table(["code", "meaning", "what to do"], rows))


BRANCHES: tuple[tuple[type[ElasticKVError], str], ...] = (
    (errors.CallerError, "The request is wrong; the same request will fail again."),
    (errors.PeerError, "Another node must act first; a retry may help."),
    (errors.OperatorError, "A person must change a flag, a file, a disk or a key."),
    (errors.CorruptionError, "Bytes are not what was written, or a committed entry cannot be "
                             "applied."),
)


def import_everything() -> None:
    """Import every module, so that every error class exists."""
    for module in pkgutil.walk_packages(elastickv.__path__, "elastickv."):
        if not module.name.startswith("elastickv.pb") and module.name != "elastickv.__main__":
            importlib.import_module(module.name)


def subclasses(base: type[ElasticKVError]) -> list[type[ElasticKVError]]:
    """`base` and everything below it, depth first."""
    below = sorted(base.__subclasses__(), key=lambda c: (c.__module__, c.__qualname__))
    return [base, *itertools.chain.from_iterable(subclasses(c) for c in below)]


def first_sentence(text: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def errors_page() -> str:
    """Every error type, by who must act."""
    import_everything()
    parts = [f"{NOTE}\n# Errors\n\nEvery error names who must act. Over gRPC it is the status "
             "shown; as the result of a command, the exit code. *Effect* says what is known of a "
             "write that ended in the error.\n"]
    for base, meaning in BRANCHES:
        rows = [[f"`{c.__name__}`", f"`{c.grpc_status}`", str(int(c.exit_code)),
                 "none" if c.outcome is errors.Outcome.NOT_APPLIED else "**unknown**",
                 first_sentence(c.__doc__)] for c in subclasses(base)]
        parts.append(f"\n## {base.__name__}\n\n{meaning}\n\n"
                     + table(["error", "gRPC status", "exit code", "effect", "meaning"], rows))
    return "".join(parts)


def commands_page() -> str:
    """The usage text of every command."""
    parts = [f"{NOTE}\n# Commands\n\nData goes to stdout, progress and errors to stderr. The "
             "settings of `elastickv node` are in [Settings of a node](flags.md).\n"]

    def add(command: click.Command, path: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=path.split()[-1], parent=parent,
                                terminal_width=90, max_content_width=90,
                                **command.context_settings)
        command._help_option = None  # click keeps it from the first context that asked
        parts.append(f"\n## {path}\n\n```text\n{command.get_help(context)}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                if child is not None and not child.hidden:
                    add(child, f"{path} {name}", context)

    add(cli, "elastickv", None)
    return "".join(parts)


def metrics_page() -> str:
    """Every metric."""
    rows = [[f"`{PREFIX}{metric.name}`", metric.kind.value,
             ", ".join(f"`{label}`" for label in metric.labels) or "none", metric.help]
            for metric in CATALOGUE]
    return (f"{NOTE}\n# Metrics\n\nServed as Prometheus text under `/metrics` with "
            "`--metrics-address`. Units are in the names: seconds and bytes. Labels take few "
            "values; user keys and values never occur. A counter or histogram appears once "
            "something was recorded.\n\n"
            + table(["metric", "kind", "labels", "meaning"], rows))


def life_cycles_page() -> str:
    """The state diagrams."""
    return NOTE + life_cycles.page()


def pages() -> dict[str, str]:
    """Every generated page by its path below docs."""
    return {"reference/flags.md": flags_page(), "reference/exit-codes.md": exit_codes_page(),
            "reference/errors.md": errors_page(), "reference/commands.md": commands_page(),
            "reference/metrics.md": metrics_page(),
            "concepts/life-cycles.md": life_cycles_page()}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"docs/{name}")
