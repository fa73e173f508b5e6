"""`elastickv node`: gather the settings, run the node."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from elastickv import config, hygiene
from elastickv.config import Kind, Setting
from elastickv.errors import ConfigError


def metavar(setting: Setting) -> str:
    """How the value is shown in the usage text."""
    if setting.kind is Kind.BOOL:
        return "[true|false]"
    if setting.choices:
        return f"[{'|'.join(setting.choices)}]"
    return f"<{setting.kind.value}>"


def option(setting: Setting) -> Callable[[Any], Any]:
    """The click option of a setting. Its text is parsed by `config`, as for every other source.

    A boolean takes an optional value, as with the Go node: `--flag` or `--flag=false`.
    """
    details = setting.help
    if setting.kind is Kind.INT:
        details += f" From {setting.minimum} to {setting.maximum}."
    if setting.default and setting.kind is not Kind.BOOL:
        details += f" Default: {setting.default}."
    boolean: dict[str, Any] = {"is_flag": False, "flag_value": "true"}
    return click.option(
        *setting.flags, setting.name, default=None, type=str,
        metavar=metavar(setting),
        help=f"{details} [{setting.variable}]",
        **(boolean if setting.kind is Kind.BOOL else {}))


def setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `function` with an option for every setting, in the order of the table."""
    for setting in reversed(config.SETTINGS):
        function = option(setting)(function)
    return function


@click.command(short_help="Run one node of a cluster.")
@click.option(config.CONFIG_FLAG, "config_path", default="", metavar="<path>",
              help="TOML file whose keys are the kebab-case flag names. "
                   f"[{config.CONFIG_VARIABLE}]")
@setting_options
def node(config_path: str, **options: str | None) -> int:
    """Run one node. A flag wins over its ELASTICKV_ variable, a variable over the file."""
    hygiene.disable_core_dumps()  # before a key is read
    flags = {name: text for name, text in options.items() if text is not None}
    settings = config.load(flags, os.environ, config_path)
    if settings.tls is not None:
        from elastickv.certs import check_node_files

        try:
            check_node_files(settings.tls, settings.raft_id)
        except ConfigError as error:
            raise config.naming_variables(error, flags, os.environ) from None
    # Read when grpc is imported, hence before that. With this listener a call takes a fifth more
    # processor time (docs/adr/0005-two-grpc-fronts.md).
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
    from elastickv.node import run_node

    return run_node(settings)
