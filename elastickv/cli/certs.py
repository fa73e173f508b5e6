"""`elastickv certs`: the authority, node certificates and client certificates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from elastickv import certs as certificates
from elastickv.certs import CertificatePair
from elastickv.cli.output import emit, output_option

DEFAULT_DIRECTORY = "certs"


def _directory_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--dir", "directory", default=DEFAULT_DIRECTORY, show_default=True,
                        type=click.Path(path_type=Path, file_okay=False),
                        help="Where the certificates and keys are kept.")(function)


def _days_option(default: int) -> Callable[..., Any]:
    return click.option("--days", default=default, show_default=True,
                        type=click.IntRange(1, 36500), help="Days of validity.")


def _show(kind: str, name: str, pair: CertificatePair, output: str) -> None:
    emit({"kind": kind, "name": name, "certificate": str(pair.cert), "key": str(pair.key)}, output)


@click.group()
def certs() -> None:
    """Make the cluster's certificates.

    Keys are written owner-only, and no file is ever overwritten. Keep ca.key off the nodes: only
    making certificates needs it.
    """


@certs.command()
@_directory_option
@_days_option(certificates.CA_DAYS)
@click.option("--name", default="elastickv CA", show_default=True, help="The CA's common name.")
@output_option
def init(directory: Path, days: int, name: str, output: str) -> None:
    """Make the certificate authority."""
    _show("ca", name, certificates.create_ca(directory, common_name=name, days=days), output)


@certs.command()
@click.argument("raft_id", metavar="RAFT_ID")
@_directory_option
@_days_option(certificates.LEAF_DAYS)
@click.option("--host", "hosts", multiple=True, metavar="NAME_OR_IP",
              help="A host name or address under which the node is reached; repeat for more. "
                   "localhost and 127.0.0.1 are always included.")
@output_option
def node(raft_id: str, directory: Path, days: int, hosts: tuple[str, ...], output: str) -> None:
    """Make the certificate of the node that runs with --raftId RAFT_ID."""
    pair = certificates.create_node(directory, raft_id, hosts=hosts, days=days)
    _show("node", raft_id, pair, output)


@certs.command()
@click.argument("name")
@_directory_option
@_days_option(certificates.LEAF_DAYS)
@output_option
def client(name: str, directory: Path, days: int, output: str) -> None:
    """Make the certificate of a client."""
    _show("client", name, certificates.create_client(directory, name, days=days), output)
