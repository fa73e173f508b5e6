"""How the client and admin commands reach the cluster: options, checks, and the call itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from elastickv.cli.output import output_option
from elastickv.client import Client
from elastickv.config import TlsFiles, parse_address
from elastickv.errors import ConfigError

DEFAULT_ENDPOINT = "127.0.0.1:50051"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Connection:
    """Whom to ask, under which identity, and for how long. Checked: see `connection_of`."""

    endpoints: tuple[str, ...]
    tls: TlsFiles | None
    timeout_s: float

    def run(self, work: Callable[[Client], Awaitable[T]]) -> T:
        """`work` with a client that is closed afterwards."""
        async def with_client() -> T:
            async with self.client() as client:
                return await work(client)

        return asyncio.run(with_client())

    def client(self, *endpoints: str) -> Client:
        """A client for these members, or for the given ones. Needs a running event loop."""
        return Client(endpoints or self.endpoints, tls=self.tls, timeout_s=self.timeout_s)


def connection_of(endpoints: str, ca: Path | None, cert: Path | None, key: Path | None,
                  insecure: bool, timeout_s: float) -> Connection:
    """Check the options. Raises `ConfigError` that names the option and the remedy."""
    addresses = tuple(part.strip() for part in endpoints.split(",") if part.strip())
    if not addresses:
        raise ConfigError("--endpoints is empty", remedy="give host:port of one or more members")
    parsed = [parse_address(address, "--endpoints") for address in addresses]
    files = {"--tls-ca": ca, "--tls-cert": cert, "--tls-key": key}
    if insecure:
        remote = [str(address) for address in parsed if not address.is_loopback]
        if remote:
            raise ConfigError(f"--insecure is refused: {', '.join(remote)} is not on this machine",
                              remedy="use --tls-ca, --tls-cert and --tls-key")
        return Connection(addresses, None, timeout_s)
    missing = [flag for flag, path in files.items() if path is None]
    if ca is None or cert is None or key is None:
        raise ConfigError(f"{', '.join(missing)} missing",
                          remedy="give the certificate files of `elastickv certs client`, or "
                                 "--insecure for nodes on this machine that run with --insecure")
    return Connection(addresses, TlsFiles(cert=cert, key=key, ca=ca), timeout_s)


def _path_option(flag: str, variable: str, help_text: str) -> Callable[[Any], Any]:
    return click.option(flag, envvar=variable, type=click.Path(path_type=Path), metavar="<path>",
                        show_envvar=True, help=help_text)


_OPTIONS: Sequence[Callable[[Any], Any]] = (
    click.option("--endpoints", envvar="ELASTICKV_ENDPOINTS", default=DEFAULT_ENDPOINT,
                 show_default=True, show_envvar=True, metavar="<host:port,...>",
                 help="Members to ask, in this order."),
    _path_option("--tls-ca", "ELASTICKV_TLS_CA", "Authority that signed the members (PEM)."),
    _path_option("--tls-cert", "ELASTICKV_TLS_CERT", "This client's certificate (PEM)."),
    _path_option("--tls-key", "ELASTICKV_TLS_KEY", "The certificate's private key (PEM)."),
    click.option("--insecure", envvar="ELASTICKV_INSECURE", is_flag=True, show_envvar=True,
                 help="No TLS; for nodes on this machine that run with --insecure."),
    click.option("--timeout", "timeout_s", envvar="ELASTICKV_TIMEOUT", default=5.0,
                 show_default=True, show_envvar=True, metavar="<seconds>",
                 type=click.FloatRange(min=0, min_open=True, max=3600),
                 help="Bounds each call, retries included."),
)


def connection_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the connection options; `function` gets a checked `connection` instead of them."""
    def with_connection(*, endpoints: str, tls_ca: Path | None, tls_cert: Path | None,
                        tls_key: Path | None, insecure: bool, timeout_s: float,
                        **rest: Any) -> Any:
        return function(connection=connection_of(endpoints, tls_ca, tls_cert, tls_key, insecure,
                                                 timeout_s), **rest)

    with_connection.__name__ = function.__name__
    with_connection.__doc__ = function.__doc__
    # Arguments and options that were declared below this decorator.
    with_connection.__click_params__ = (  # type: ignore[attr-defined]
        getattr(function, "__click_params__", []))
    decorated: Callable[..., Any] = with_connection
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def command(group: click.Group, name: str, example: str) -> Callable[[Any], click.Command]:
    """A command of `group` with the connection and output options, and an example in its help."""
    def decorate(function: Any) -> click.Command:
        decorated = connection_options(output_option(function))
        return group.command(name, epilog=f"\b\nExample:\n  {example}")(decorated)

    return decorate
