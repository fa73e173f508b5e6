"""The TLS contexts of a node: mutual, so a peer without a certificate of the CA gets nowhere."""

from __future__ import annotations

import ssl

from elastickv.config import TlsFiles
from elastickv.errors import ConfigError


def link_context(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    """Between members: TLS 1.3. Raises `ConfigError` when a file cannot be read or does not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A peer is known by the node id in its certificate, whatever address it answers at.
    context.check_hostname = False
    return _loaded(context, files)


def listener_context(files: TlsFiles) -> ssl.SSLContext:
    """For clients: TLS 1.2 or later, ALPN "h2". Raises `ConfigError` as `link_context` does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return _loaded(context, files)


def _loaded(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
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
