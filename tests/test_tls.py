"""elastickv.tls: what a node's listeners take from a handshake, and that every one is whole."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from elastickv import certs
from elastickv.config import TlsFiles
from elastickv.tls import link_context, listener_context

Listener = Callable[[TlsFiles], ssl.SSLContext]
LISTENERS = pytest.mark.parametrize("listener", [
    partial(link_context, server=True), listener_context], ids=["members", "clients"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    certs.create_ca(directory)
    for name in ("n1", "n2"):
        certs.create_node(directory, name)
    return directory


def files_of(directory: Path, name: str) -> TlsFiles:
    pair = certs.pair_paths(directory, name)
    return TlsFiles(pair.cert, pair.key, certs.pair_paths(directory, "ca").cert)


def connected(client: ssl.SSLContext, server: ssl.SSLContext,
              session: ssl.SSLSession | None = None) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a connection over which a byte has come to the client, and with it whatever the
    server tells after a handshake."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server, session=session),
            server.wrap_bio(to_server, to_client, server_side=True))
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    ends[1].write(b"x")
    assert ends[0].read(1) == b"x"
    return ends


@LISTENERS
def test_a_certificate_is_looked_at_in_every_handshake(directory: Path, listener: Listener) -> None:
    """A session that is taken up again shows none, and one that has expired meanwhile goes on."""
    server = listener(files_of(directory, "n1"))
    client = link_context(files_of(directory, "n2"), server=False)
    first, _ = connected(client, server)
    _, second = connected(client, server, first.session)
    assert second.session_reused is False


@LISTENERS
def test_no_older_tls_is_spoken(directory: Path, listener: Listener) -> None:
    """Before TLS 1.3 the client itself may carry the session from one connection to the next."""
    client = link_context(files_of(directory, "n2"), server=False)
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        connected(client, listener(files_of(directory, "n1")))
