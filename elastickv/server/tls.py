"""The TLS files of a listener: mutual, so a caller without a certificate of the CA gets nowhere."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from elastickv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files: this server's certificate and key, and the CA that clients must be signed by."""

    cert: Path
    key: Path
    ca: Path

    def ssl_context(self) -> ssl.SSLContext:
        """For asyncio listeners: TLS 1.2 or later, client certificate required, ALPN "h2".

        Raises `ConfigError` when a file cannot be read or does not fit.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key)
            context.load_verify_locations(self.ca)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"the TLS files {self.cert}, {self.key} and {self.ca} cannot be used: "
                f"{error.strerror or error}",
                remedy="check --tls-cert, --tls-key and --tls-ca; `elastickv certs node` makes them"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For grpc.aio, which accepts any bytes and fails later without a reason, so the files are
        checked first. Raises `ConfigError`."""
        self.ssl_context()
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.cert.read_bytes())], self.ca.read_bytes(),
            require_client_auth=True)
