"""Certificates of a cluster: one authority, one certificate per node and per client.

EC P-256 throughout. A node certificate has the node id as common name and as DNS name, and is both
server and client: members authenticate each other with it. A client certificate is client only and
has no DNS name: by either a member tells a client called `n1` from the node `n1`, since other tools
may give a client's certificate a DNS name too.

Files of a directory: `ca.crt ca.key`, `<name>.crt <name>.key`. Private keys are owner-only. Nothing
is ever overwritten: a file that exists is an error that names it.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from elastickv.config import (
    MAX_COMMON_NAME_CHARACTERS,
    TlsFiles,
    parse_node_id,
    require_certifiable,
)
from elastickv.errors import ConfigError
from elastickv.tls import refusal_of

CA_NAME = "ca"
CA_DAYS = 3650
LEAF_DAYS = 825
BACKDATE = datetime.timedelta(minutes=5)
"""Certificates become valid a little in the past, so that members whose clocks lag accept them."""

_OWNER_ONLY = 0o600
_PUBLIC = 0o644


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """Paths of a certificate and its private key."""

    cert: Path
    key: Path


def pair_paths(directory: Path, name: str) -> CertificatePair:
    """Where the certificate and the key of `name` are kept."""
    return CertificatePair(directory / f"{name}.crt", directory / f"{name}.key")


def create_ca(directory: Path, *, common_name: str = "elastickv CA",
              days: int = CA_DAYS, now: datetime.datetime | None = None) -> CertificatePair:
    """Make a certificate authority in `directory` (created owner-only if absent).

    Raises `ConfigError` if one is there already, for an impossible name, or where nothing can be
    written.
    """
    private_key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(common_name)
    usage = _key_usage(certificate_sign=True)
    certificate = (
        _builder(subject, subject, private_key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private_key.public_key()),
                       critical=False)
        .sign(private_key, hashes.SHA256())
    )
    return _write_pair(directory, CA_NAME, certificate, private_key)


def create_node(directory: Path, node_id: str, *, hosts: Sequence[str] = (),
                days: int = LEAF_DAYS, now: datetime.datetime | None = None) -> CertificatePair:
    """Make the certificate of node `node_id`, signed by the authority in `directory`.

    It is valid for the node id, `localhost`, 127.0.0.1 and `hosts` (names or IP addresses), as
    server and as client. Raises `ConfigError` as `create_ca` does, and without an authority.
    """
    require_certifiable(parse_node_id(node_id, "node id"))
    # As a DNS name also where the id reads as an IP address: members look for it there.
    names = [x509.DNSName(node_id),
             *_alternative_names([node_id, "localhost", "127.0.0.1", *hosts])]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _create_leaf(directory, node_id, usages, list(dict.fromkeys(names)), days, now)


def create_client(directory: Path, name: str, *, days: int = LEAF_DAYS,
                  now: datetime.datetime | None = None) -> CertificatePair:
    """Make the certificate of client `name`, signed by the authority in `directory`. Raises
    `ConfigError` as `create_node` does."""
    parse_node_id(name, "client name")
    return _create_leaf(directory, name, [ExtendedKeyUsageOID.CLIENT_AUTH], [], days, now)


def _create_leaf(directory: Path, name: str, usages: list[x509.ObjectIdentifier],
                 names: list[x509.GeneralName], days: int,
                 now: datetime.datetime | None) -> CertificatePair:
    if name == CA_NAME:
        raise ConfigError(f"{name!r} is the authority's name", remedy="choose another name")
    ca_certificate, ca_key = _load_ca(directory)
    private_key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_name(name), ca_certificate.subject, private_key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificate_sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                       critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _write_pair(directory, name, builder.sign(ca_key, hashes.SHA256()), private_key)


def _builder(subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey,
             days: int, now: datetime.datetime | None) -> x509.CertificateBuilder:
    start = (now or datetime.datetime.now(datetime.UTC)) - BACKDATE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + BACKDATE + datetime.timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    if not 1 <= len(common_name) <= MAX_COMMON_NAME_CHARACTERS:
        raise ConfigError(f"--name: {common_name!r} has {len(common_name)} characters",
                          remedy=f"use 1 to {MAX_COMMON_NAME_CHARACTERS}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, certificate_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificate_sign, key_cert_sign=certificate_sign,
        crl_sign=certificate_sign, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False)


def _alternative_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not host.isascii() or not host or any(c in host for c in " /,:\0"):
                raise ConfigError(f"--host: {host!r} is neither a host name nor an IP address",
                                  remedy="give one name or address per --host") from None
            names.append(x509.DNSName(host))
    return names


def _load_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    paths = pair_paths(directory, CA_NAME)
    try:
        certificate = x509.load_pem_x509_certificate(paths.cert.read_bytes())
        key = serialization.load_pem_private_key(paths.key.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise ConfigError(f"no certificate authority: {error.filename} does not exist",
                          remedy="run `elastickv certs init` first") from None
    except (OSError, ValueError, TypeError):
        raise ConfigError(f"the certificate authority in {directory} cannot be read",
                          remedy="check that ca.crt and ca.key are readable PEM files") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{paths.key} is not an EC key: this command signs with EC keys only",
                          remedy="sign with what made that authority, or make another one with "
                                 "`elastickv certs init`")
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{paths.key} is not the private key of {paths.cert}",
                          remedy="put the matching pair back")
    return certificate, key


def _write_pair(directory: Path, name: str, certificate: x509.Certificate,
                private_key: ec.EllipticCurvePrivateKey) -> CertificatePair:
    paths = pair_paths(directory, name)
    for path in (paths.cert, paths.key):
        if path.exists():
            raise ConfigError(f"{path} exists and is never overwritten",
                              remedy="move it away first, or choose another --dir or name")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--dir: {directory} cannot be made: {error.strerror}",
                          remedy="choose another directory") from None
    key_bytes = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption())
    # The key first: a certificate without its key would look complete and be useless.
    _create_file(paths.key, key_bytes, _OWNER_ONLY)
    try:
        _create_file(paths.cert, certificate.public_bytes(serialization.Encoding.PEM), _PUBLIC)
    except ConfigError:
        _forget(paths.key)
        raise
    return paths


def _create_file(path: Path, content: bytes, mode: int) -> None:
    """Write a new file, whole or not at all; O_EXCL settles a race between two commands."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise ConfigError(f"{path} exists and is never overwritten",
                          remedy="move it away first, or choose another --dir or name") from None
    except OSError as error:
        raise ConfigError(f"--dir: {path} cannot be made: {error.strerror}",
                          remedy="choose a directory that this user may write") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # What is left of it would never be overwritten.
        _forget(path)
        raise ConfigError(f"--dir: {path} cannot be written: {error.strerror}",
                          remedy="free space there, or choose another directory") from None


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


# --- checking what a node was given ----------------------------------------------------------


_OUT_OF_TIME = (9, 10)
_REMEDIES = {
    **dict.fromkeys((2, 18, 19, 20, 21),
                    "let --tls-ca hold the root authority, and --tls-cert the node's certificate "
                    "followed by every one between the two"),
    26: "make one for both extended key usages, server and client authentication",
}
"""By OpenSSL's X509_V_ERR codes."""


def check_node_files(files: TlsFiles, node_id: str) -> None:
    """Refuse TLS files that cannot work, before anything is started with them.

    --tls-cert may go on with the chain that leads to --tls-ca, and --tls-ca may hold several
    authorities, as while one takes the place of another: those that signed must be valid, the
    others need not be. Raises `ConfigError` that names the flag and the file: unreadable or no PEM,
    a key of another certificate, a certificate that is not (or no longer) valid, that is not one of
    `node_id`, or that members which trust the same --tls-ca would refuse for any other reason.
    """
    certificate, *chain = _parse_certificates("--tls-cert", files.cert)
    authorities = _parse_certificates("--tls-ca", files.ca)
    key = _parse_key(files.key)
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"--tls-key {files.key} is not the private key of {files.cert}",
                          remedy="give the pair that was made together")
    _require_valid(f"--tls-cert {files.cert}", certificate)
    if node_id not in _dns_names(certificate):
        raise ConfigError(f"--tls-cert {files.cert} is not a certificate of node {node_id}",
                          remedy=f"make one with `elastickv certs node {node_id}`")
    refusal = refusal_of(files)
    if refusal is None:
        return
    if refusal.code in _OUT_OF_TIME:
        # OpenSSL does not say which one.
        for what, issuers in ((f"--tls-cert {files.cert}", chain),
                              (f"--tls-ca {files.ca}", authorities)):
            for issuer in issuers:
                _require_valid(f"{issuer.subject.rfc4514_string()} in {what}", issuer)
    raise ConfigError(
        f"members would refuse --tls-cert {files.cert} as a {refusal.role}'s, with --tls-ca "
        f"{files.ca}: {refusal.reason}",
        remedy=_REMEDIES.get(refusal.code, f"make one with `elastickv certs node {node_id}`"))


def uncovered_host(files: TlsFiles, host: str) -> str:
    """Why clients that connect to `host` would refuse this node; "" = they accept it.

    No reason not to start: how clients reach the node, under which name, is theirs to say. Raises
    `ConfigError` as `check_node_files` does.
    """
    certificate = _parse_certificates("--tls-cert", files.cert)[0]
    try:
        covered = ipaddress.ip_address(host) in _addresses(certificate)
    except ValueError:
        covered = any(_matches(name, host) for name in _dns_names(certificate))
    return "" if covered else (f"--tls-cert {files.cert} is not valid for {host}, the host of "
                               "--address: clients that connect to it there refuse it")


def _matches(name: str, host: str) -> bool:
    """Whether a DNS name of a certificate covers `host`; `*` stands for the first label."""
    name, host = name.lower(), host.lower()
    return name == host or (name.startswith("*.") and name[1:] == host[host.find("."):])


def _require_valid(what: str, certificate: x509.Certificate) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= datetime.datetime.now(datetime.UTC) <= end:
        raise ConfigError(f"{what} is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d} only",
                          remedy="make a new certificate, or set this machine's clock")


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def _dns_names(certificate: x509.Certificate) -> list[str]:
    return _names(certificate).get_values_for_type(x509.DNSName)


def _addresses(certificate: x509.Certificate) -> Sequence[object]:
    return _names(certificate).get_values_for_type(x509.IPAddress)


def allows_server(certificate: bytes) -> bool:
    """Whether a certificate in DER form may be a server's, as every node's may and no client's.

    One that names no extended key usages may be anybody's. One that does not parse is nobody's.
    """
    try:
        extensions = x509.load_der_x509_certificate(certificate).extensions
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    except (ValueError, x509.DuplicateExtension, x509.InvalidVersion,
            x509.UnsupportedGeneralNameType):
        return False
    return ExtendedKeyUsageOID.SERVER_AUTH in usages


def _parse_certificates(flag: str, path: Path) -> list[x509.Certificate]:
    """Every certificate in a file, at least one."""
    try:
        return x509.load_pem_x509_certificates(_read(flag, path))
    except ValueError:
        raise ConfigError(f"{flag} {path} holds no certificate in PEM form",
                          remedy="name a PEM file with a certificate") from None


def _parse_key(path: Path) -> CertificateIssuerPrivateKeyTypes:
    try:
        key = serialization.load_pem_private_key(_read("--tls-key", path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"--tls-key {path} holds no unencrypted private key in PEM form",
                          remedy="name a PEM file with the certificate's private key") from None
    return cast("CertificateIssuerPrivateKeyTypes", key)


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}",
                          remedy="name a readable file") from None
