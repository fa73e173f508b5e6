"""The documentation is current: generated pages, links, and every command line that it shows."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from elastickv.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import generate_reference  # noqa: E402

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"),
                *(ROOT / "jepsen").glob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
SHELL_BLOCK = re.compile(r"^( *)```(?:sh|bash|shell)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


GENERATED = ["reference/flags.md", "reference/exit-codes.md", "reference/errors.md",
             "reference/commands.md", "reference/metrics.md", "concepts/life-cycles.md"]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_page_is_current(name: str) -> None:
    written = (generate_reference.DOCS / name).read_text(encoding="utf-8")
    assert written == generate_reference.pages()[name], "run `make reference`"


def test_every_generated_page_is_tested() -> None:
    assert sorted(generate_reference.pages()) == sorted(GENERATED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = [target for target in LINK.findall(text)
              if not re.match(r"[a-z]+:|#", target)
              and not (page.parent / target.split("#")[0]).exists()]
    assert broken == []


@pytest.mark.parametrize(("package", "document"), [
    ("raft", "engine.md"), ("store", "store.md"), ("kv", "kv.md"),
])
def test_every_module_is_in_the_map_of_its_package(package: str, document: str) -> None:
    text = (ROOT / "docs" / "internals" / document).read_text(encoding="utf-8")
    parts = text.split("## The parts")[1].split("\n## ")[0]
    modules = {path.name for path in (ROOT / "elastickv" / package).glob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", parts)) == modules - {"__init__.py"}


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Knows the tags of mkdocs.yml."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)
    configuration = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)  # noqa: S506

    def leaves(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        else:
            for child in node.values() if isinstance(node, dict) else node:
                yield from leaves(child)

    in_navigation = set(leaves(configuration["nav"]))
    on_disk = {path.relative_to(ROOT / "docs").as_posix()
               for path in (ROOT / "docs").rglob("*.md")}
    assert in_navigation == on_disk


def command_lines() -> list[tuple[str, list[str]]]:
    """Every `elastickv ...` in a shell block of the documentation, also with its path and under
    sudo, as arguments."""
    found: list[tuple[str, list[str]]] = []
    for page in PAGES:
        for _, block in SHELL_BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["sudo", "-u"]:
                    words = words[3:]
                if words and Path(words[0]).name == "elastickv":
                    found.append((page.name, words[1:]))
    return found


def check_arguments(command: click.Command, arguments: list[str],
                    parent: click.Context | None = None) -> None:
    """Parse `arguments` without running anything; raises what click would say."""
    context = command.make_context(command.name or "elastickv", list(arguments), parent=parent)
    if isinstance(command, click.Group):
        name, child, rest = command.resolve_command(context, [*context._protected_args,
                                                              *context.args])
        if name is None or child is None:
            raise click.UsageError(f"no command in {arguments}")
        check_arguments(child, rest, context)


@pytest.mark.parametrize(("page", "arguments"), command_lines(),
                         ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_command_lines_parse(page: str, arguments: list[str]) -> None:
    if "--help" in arguments or "--version" in arguments:  # these answer while parsing
        with pytest.raises(click.exceptions.Exit):
            check_arguments(cli, arguments)
    else:
        check_arguments(cli, arguments)


def test_the_check_of_command_lines_itself() -> None:
    assert len(command_lines()) > 10
    with pytest.raises(click.UsageError):
        check_arguments(cli, ["certs", "init", "--no-such-flag"])
    with pytest.raises(click.UsageError):
        check_arguments(cli, ["no-such-command"])
