"""Mutual TLS for the second table: certificates, and a proxy in front of the load generator.

h2load has no client certificates, so it speaks plain HTTP/2 to an haproxy on the same machine,
which passes the bytes on over mutual TLS. Both systems are measured through it; it is part of the
generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc

from jepsen.network.ports import HOST, free_ports

CLIENT = "bench"


class Pki:
    """A certificate authority, one certificate per member (n0 ...), one for the client."""

    def __init__(self, directory: Path, members: Sequence[str]) -> None:
        from elastickv import certs

        self.directory = directory
        if not (directory / "ca.crt").exists():
            directory.mkdir(parents=True, exist_ok=True)
            certs.create_ca(directory)
            for member in members:
                certs.create_node(directory, member)
            certs.create_client(directory, CLIENT)

    @property
    def ca(self) -> str:
        return str(self.directory / "ca.crt")

    def cert(self, name: str) -> str:
        return str(self.directory / f"{name}.crt")

    def key(self, name: str) -> str:
        return str(self.directory / f"{name}.key")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """What the benchmark's own client connects with."""
        return grpc.ssl_channel_credentials(
            Path(self.ca).read_bytes(), Path(self.key(CLIENT)).read_bytes(),
            Path(self.cert(CLIENT)).read_bytes())


class TlsProxy:
    """The command line and ports of an haproxy that reaches `ports` over mutual TLS."""

    def __init__(self, pki: Pki, directory: Path, ports: Sequence[int]) -> None:
        self.ports = free_ports(len(ports))
        pair = directory / "client.pem"
        pair.write_text(Path(pki.cert(CLIENT)).read_text() + Path(pki.key(CLIENT)).read_text())
        pair.chmod(0o600)
        self._configuration = directory / "haproxy.cfg"
        self._configuration.write_text(proxy_configuration(
            list(zip(self.ports, ports, strict=True)), pair=str(pair), ca=pki.ca))

    def command(self) -> list[str]:
        return ["haproxy", "-db", "-f", str(self._configuration)]


def proxy_configuration(routes: Sequence[tuple[int, int]], *, pair: str, ca: str) -> str:
    """An haproxy configuration that passes bytes from each first port, in the clear, to the second
    one over mutual TLS."""
    lines = ["global", "  nbthread 1", "defaults", "  mode tcp", "  timeout connect 5s",
             "  timeout client 1h", "  timeout server 1h"]
    for listen, target in routes:
        lines += [f"listen to-{target}", f"  bind {HOST}:{listen}",
                  f"  server member {HOST}:{target} ssl crt {pair} ca-file {ca} "
                  "verify required alpn h2"]
    return "\n".join(lines) + "\n"
