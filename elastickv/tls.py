"""The TLS contexts of a node: mutual, so a peer without a certificate of the CA gets nowhere.

TLS 1.3, and no session is taken up again: that shows no certificate, so it would outlive one that
has expired. Before TLS 1.3 a client keeps its session by itself.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import NamedTuple

from elastickv.config import TlsFiles
from elastickv.errors import ConfigError

_TURNS = 3
"""Of each side, one more than a handshake of TLS 1.3 takes."""


def link_context(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    """Between members. Raises `ConfigError` when a file cannot be read or does not fit."""
    context = _server_context() if server else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A peer is known by the node id in its certificate, whatever address it answers at.
    context.check_hostname = False
    return _loaded(context, files)


def listener_context(files: TlsFiles) -> ssl.SSLContext:
    """For clients: ALPN "h2". Raises `ConfigError` as `link_context` does."""
    context = _server_context()
    context.set_alpn_protocols(["h2"])
    return _loaded(context, files)


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    return context


def _loaded(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(files.cert, files.key)
        context.load_verify_locations(files.ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"the TLS files {files.cert}, {files.key} and {files.ca} cannot be used: "
            f"{error.strerror or error}",
            remedy="check --tls-cert, --tls-key and --tls-ca; `elastickv certs node` makes them"
        ) from None
    return context


class Refusal(NamedTuple):
    """Why a handshake failed: the role of the certificate that was refused, OpenSSL's reason, and
    its X509_V_ERR code (0 where it is no certificate that is wrong)."""

    role: str
    reason: str
    code: int


def refusal_of(files: TlsFiles) -> Refusal | None:
    """What others that were given the same --tls-ca would object to; None = nothing.

    `files` shake hands with themselves, in memory: as two members, and as a client of a member.
    Raises `ConfigError` as `link_context` does.
    """
    client = link_context(files, server=False)
    for server in (link_context(files, server=True), listener_context(files)):
        refusal = _shake_hands(client, server)
        if refusal is not None:
            return refusal
    return None


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> Refusal | None:
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    # Each side judges the other's certificate.
    turns = (("server", client.wrap_bio(to_client, to_server)),
             ("client", server.wrap_bio(to_server, to_client, server_side=True)))
    for role, side in turns * _TURNS:
        try:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        except ssl.SSLCertVerificationError as error:
            return Refusal(role, error.verify_message, error.verify_code)
        except ssl.SSLError as error:
            return Refusal(role, error.reason or str(error), 0)
    return None
