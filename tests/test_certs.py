"""elastickv.certs: what certificates say, whom they verify, and that nothing is overwritten."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ipaddress
import os
import resource
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from elastickv import certs
from elastickv.certs import CertificatePair
from elastickv.config import TlsFiles
from elastickv.errors import ConfigError, ExitCode

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
CODE_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    directory = tmp_path / "certs"
    certs.create_ca(directory)
    return directory


def load(pair: CertificatePair) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pair.cert.read_bytes())


def common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def test_authority(authority: Path) -> None:
    certificate = load(certs.pair_paths(authority, "ca"))
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lifetime.days == 3650
    certificate.verify_directly_issued_by(certificate)


def test_node_certificate(authority: Path) -> None:
    pair = certs.create_node(authority, "n1", hosts=["db1.example", "10.0.0.7", "::7", "localhost"])
    certificate = load(pair)
    assert common_name(certificate) == "n1"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["n1", "localhost", "db1.example"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(ip) for ip in ("127.0.0.1", "10.0.0.7", "::7")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {CLIENT, SERVER}
    certificate.verify_directly_issued_by(load(certs.pair_paths(authority, "ca")))


@pytest.mark.parametrize("node_id", ["n1", "10.0.0.1", "db1.example"])
def test_a_node_certificate_names_the_node_whatever_its_id_looks_like(authority: Path,
                                                                      node_id: str) -> None:
    pair = certs.create_node(authority, node_id, hosts=["10.0.0.1", "db1.example"])
    names = load(pair).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == list(dict.fromkeys(names))
    assert ipaddress.ip_address("10.0.0.1") in names.get_values_for_type(x509.IPAddress)
    certs.check_node_files(TlsFiles(pair.cert, pair.key, authority / "ca.crt"), node_id)


def test_client_certificate_cannot_pose_as_a_node(authority: Path) -> None:
    certificate = load(certs.create_client(authority, "alice"))
    assert common_name(certificate) == "alice"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {CLIENT}
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize(("usages", "expected"), [
    ([SERVER, CLIENT], True), ([SERVER], True), ([CLIENT], False), ([CODE_SIGNING], False),
    ([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, CLIENT], False), (None, True),
], ids=["both", "server", "client", "another", "any", "no such extension"])
def test_a_certificate_with_usages_needs_the_servers_to_be_a_nodes(
        usages: list[x509.ObjectIdentifier] | None, expected: bool) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n1")])
    builder = certs._builder(name, name, key.public_key(), 1, None)
    if usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    assert certs.allows_server(certificate.public_bytes(serialization.Encoding.DER)) is expected


@pytest.mark.parametrize("certificate", [b"", b"\x30\x00", bytes(64)])
def test_a_certificate_that_does_not_parse_is_no_nodes(certificate: bytes) -> None:
    assert not certs.allows_server(certificate)


def test_keys_are_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        pairs = [certs.create_ca(tmp_path / "c"), certs.create_node(tmp_path / "c", "n1"),
                 certs.create_client(tmp_path / "c", "alice")]
    finally:
        os.umask(previous)
    assert [stat.S_IMODE(pair.key.stat().st_mode) for pair in pairs] == [0o600] * 3
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700


@pytest.mark.parametrize("present", ["crt", "key"])
def test_nothing_is_overwritten(authority: Path, present: str) -> None:
    existing = authority / f"n1.{present}"
    existing.write_text("precious")
    with pytest.raises(ConfigError, match=str(existing)):
        certs.create_node(authority, "n1")
    assert existing.read_text() == "precious"
    assert not (authority / f"n1.{'key' if present == 'crt' else 'crt'}").exists()


def test_a_second_authority_is_refused(authority: Path) -> None:
    before = (authority / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        certs.create_ca(authority)
    assert (authority / "ca.key").read_bytes() == before


def test_no_authority(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="certs init"):
        certs.create_node(tmp_path, "n1")


def test_broken_authority(authority: Path) -> None:
    (authority / "ca.key").write_text("-----BEGIN nothing")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        certs.create_node(authority, "n1")
    assert caught.value.__cause__ is None


def test_key_of_another_authority(authority: Path, tmp_path: Path) -> None:
    other = certs.create_ca(tmp_path / "other")
    (authority / "ca.key").write_bytes(other.key.read_bytes())
    with pytest.raises(ConfigError, match="not the private key"):
        certs.create_node(authority, "n1")


def test_an_authority_with_another_kind_of_key_is_named_as_such(authority: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "RSA")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name)
                   .public_key(key.public_key()).serial_number(1).not_valid_before(now)
                   .not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256()))
    (authority / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (authority / "ca.key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()))
    with pytest.raises(ConfigError, match="not an EC key"):
        certs.create_node(authority, "n1")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """RLIMIT_FSIZE stands in for a disk that fills up."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 300], ids=["nothing fits", "not the key", "the key only"])
def test_what_a_full_disk_cut_off_is_not_left_behind(tmp_path: Path, size: int) -> None:
    """It would never be overwritten, and would look like an authority."""
    with files_of_at_most(size), pytest.raises(ConfigError, match="cannot be written"):
        certs.create_ca(tmp_path)
    assert list(tmp_path.iterdir()) == []
    certs.create_ca(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_directory_that_takes_no_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--dir: /proc/self/ca\.key cannot be made"):
        certs.create_ca(Path("/proc/self"))


def test_no_node_is_named_as_every_node_is(authority: Path) -> None:
    with pytest.raises(ConfigError, match="localhost"):
        certs.create_node(authority, "localhost")


@pytest.mark.parametrize("name", ["", "ca", "a/b", "..", "a b", "n" * 65, "é"])
def test_bad_names(authority: Path, name: str) -> None:
    before = sorted(authority.iterdir())
    with pytest.raises(ConfigError):
        certs.create_node(authority, name)
    with pytest.raises(ConfigError):
        certs.create_client(authority, name)
    assert sorted(authority.iterdir()) == before


@pytest.mark.parametrize("host", ["", "a b", "a/b", "a,b", "ünicode"])
def test_bad_hosts(authority: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        certs.create_node(authority, "n1", hosts=[host])


def test_validity_starts_in_the_past(authority: Path) -> None:
    now = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    certificate = load(certs.create_node(authority, "n1", days=10, now=now))
    assert certificate.not_valid_before_utc == now - certs.BACKDATE
    assert certificate.not_valid_after_utc == now + datetime.timedelta(days=10)


def files_of(directory: Path, name: str) -> TlsFiles:
    pair = certs.pair_paths(directory, name)
    return TlsFiles(pair.cert, pair.key, directory / "ca.crt")


def test_own_files_are_accepted(authority: Path) -> None:
    certs.create_node(authority, "n1")
    certs.check_node_files(files_of(authority, "n1"), "n1")


@pytest.mark.parametrize(("damage", "words"), [
    ("missing", "cannot read"), ("empty", "PEM"), ("garbage", "PEM"), ("directory", "cannot read")])
@pytest.mark.parametrize("flag", ["cert", "key", "ca"])
def test_unusable_files_are_named(authority: Path, flag: str, damage: str, words: str) -> None:
    certs.create_node(authority, "n1")
    bad = authority / "bad.pem"
    if damage == "directory":
        bad.mkdir()
    elif damage != "missing":
        bad.write_text("" if damage == "empty" else "-----BEGIN nothing")
    files = dataclasses.replace(files_of(authority, "n1"), **{flag: bad})
    with pytest.raises(ConfigError, match=rf"--tls-{flag}.*bad\.pem.*{words}|"
                                          rf"--tls-{flag}: {words} .*bad\.pem"):
        certs.check_node_files(files, "n1")


def joined(path: Path, *parts: Path) -> Path:
    """One PEM file of several."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize("newest_first", [True, False])
def test_an_authority_is_replaced_step_by_step(authority: Path, tmp_path: Path,
                                               newest_first: bool) -> None:
    """Both have the same name. While both are in every --tls-ca, certificates of either will do."""
    new = tmp_path / "new"
    certs.create_ca(new)
    certs.create_node(authority, "n1")
    certs.create_node(new, "n2")
    order = (new, authority) if newest_first else (authority, new)
    both = joined(tmp_path / "both.crt", *(directory / "ca.crt" for directory in order))
    n1 = dataclasses.replace(files_of(authority, "n1"), ca=both)
    n2 = dataclasses.replace(files_of(new, "n2"), ca=both)
    certs.check_node_files(n1, "n1")
    certs.check_node_files(n2, "n2")
    for server, client in ((n1, n2), (n2, n1)):
        name = server.cert.stem
        assert handshake(CertificatePair(server.cert, server.key),
                         CertificatePair(client.cert, client.key), both, name) == (
            (("commonName", client.cert.stem),),)


def test_an_authority_that_has_expired_beside_the_one_that_signed(authority: Path,
                                                                  tmp_path: Path) -> None:
    old = tmp_path / "old"
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=20)
    certs.create_ca(old, days=10, now=past)
    certs.create_node(authority, "n1")
    both = joined(tmp_path / "both.crt", old / "ca.crt", authority / "ca.crt")
    certs.check_node_files(dataclasses.replace(files_of(authority, "n1"), ca=both), "n1")
    certs.create_node(old, "n1")
    with pytest.raises(ConfigError, match=r"--tls-ca .*both\.crt is valid from"):
        certs.check_node_files(dataclasses.replace(files_of(old, "n1"), ca=both), "n1")


NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Company(NamedTuple):
    """A node's certificate as a company's authority makes it: a root, one that issues, the node."""

    root: Path
    issuing: Path
    node: Path
    key: Path


def company(directory: Path, usages: Sequence[x509.ObjectIdentifier] = (), *,
            root_ends: datetime.datetime = NOW + DAY,
            issuing_begins: datetime.datetime = NOW - 2 * DAY,
            issuing_ends: datetime.datetime = NOW + DAY) -> Company:
    """Files for node n1; no `usages` is a certificate for any purpose."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
             for name in ("root", "issuing", "n1")]
    times = [(NOW - 2 * DAY, root_ends), (issuing_begins, issuing_ends), (NOW - DAY, NOW + DAY)]
    paths = []
    for level, (key, name, (begins, ends)) in enumerate(zip(keys, names, times, strict=True)):
        signer = max(0, level - 1)
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(names[signer])
            .public_key(key.public_key()).serial_number(level + 1)
            .not_valid_before(begins).not_valid_after(ends)
            .add_extension(x509.BasicConstraints(level < 2, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"n{level - 1}")]), False))
        if level == 2 and usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        paths.append(directory / f"{level}.crt")
        paths[-1].write_bytes(builder.sign(keys[signer], hashes.SHA256())
                              .public_bytes(serialization.Encoding.PEM))
    key_path = directory / "company.key"
    key_path.write_bytes(keys[2].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()))
    return Company(*paths, key_path)


def chain_of(directory: Path, made: Company) -> TlsFiles:
    """As --tls-cert and --tls-ca should be: the node and what leads to the root; the root."""
    return TlsFiles(joined(directory / "chain.crt", made.node, made.issuing), made.key, made.root)


@pytest.mark.parametrize("usages", [(), (SERVER, CLIENT), (SERVER, CLIENT, CODE_SIGNING)],
                         ids=["any", "both", "more than both"])
def test_a_chain_leads_to_the_authority(tmp_path: Path,
                                        usages: Sequence[x509.ObjectIdentifier]) -> None:
    made = company(tmp_path, usages)
    certs.check_node_files(chain_of(tmp_path, made), "n1")
    both = joined(tmp_path / "ca.crt", made.issuing, made.root)
    certs.check_node_files(TlsFiles(made.node, made.key, both), "n1")


@pytest.mark.parametrize(("usages", "role"), [
    ((SERVER,), "client"), ((CLIENT,), "server"), ((CODE_SIGNING,), "server")],
    ids=["server", "client", "code signing"])
def test_a_node_needs_a_certificate_for_both_roles(
        tmp_path: Path, usages: Sequence[x509.ObjectIdentifier], role: str) -> None:
    files = chain_of(tmp_path, company(tmp_path, usages))
    with pytest.raises(ConfigError, match=rf"as a {role}'s.*unsuitable certificate purpose.*"
                                          r"Remedy: .*server and client authentication"):
        certs.check_node_files(files, "n1")


def test_doctor_names_the_certificate_that_members_would_refuse(tmp_path: Path) -> None:
    files = chain_of(tmp_path, company(tmp_path, (SERVER,)))
    done = subprocess.run(
        [sys.executable, "-m", "elastickv", "doctor", "--raftId", "n1", "--raftBootstrap",
         "--raftDataDir", str(tmp_path / "data"), "--tls-cert", str(files.cert),
         "--tls-key", str(files.key), "--tls-ca", str(files.ca)],
        capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "tls-files\tfail" in done.stdout) == (ExitCode.ERROR, True)
    assert "unsuitable certificate purpose" in done.stdout
    assert "server and client authentication" in done.stdout


@pytest.mark.parametrize(("chain", "trusted"), [
    (["node"], ["root"]), (["node"], ["issuing"]), (["node", "issuing"], ["issuing"])],
    ids=["no link to the root", "no root", "no root after the link"])
def test_a_chain_that_does_not_end_in_a_root_is_refused(tmp_path: Path, chain: list[str],
                                                        trusted: list[str]) -> None:
    made = company(tmp_path)
    cert, ca = (joined(tmp_path / name, *(getattr(made, part) for part in parts))
                for name, parts in (("chain.crt", chain), ("trusted.crt", trusted)))
    with pytest.raises(ConfigError, match=r"unable to get .*issuer certificate.*"
                                          r"Remedy: .*--tls-ca .*root"):
        certs.check_node_files(TlsFiles(cert, made.key, ca), "n1")


@pytest.mark.parametrize(("times", "words"), [
    ({"issuing_ends": NOW - DAY}, r"CN=issuing in --tls-cert .*chain\.crt is valid from"),
    ({"issuing_begins": NOW + DAY / 2}, r"CN=issuing in --tls-cert .*chain\.crt is valid from"),
    ({"root_ends": NOW - DAY}, r"CN=root in --tls-ca .*0\.crt is valid from"),
], ids=["expired", "not yet valid", "root expired"])
def test_every_link_of_the_chain_must_be_valid(
        tmp_path: Path, times: dict[str, datetime.datetime], words: str) -> None:
    files = chain_of(tmp_path, company(tmp_path, **times))
    with pytest.raises(ConfigError, match=words):
        certs.check_node_files(files, "n1")


@pytest.mark.parametrize(("host", "covered"), [
    ("n1", True), ("N1", True), ("localhost", True), ("127.0.0.1", True), ("10.0.0.7", True),
    ("db.example", True), ("a.wild.example", True), ("A.Wild.Example", True),
    ("10.0.0.8", False), ("127.0.0.2", False), ("::1", False), ("n2", False),
    ("wild.example", False), ("a.b.wild.example", False), ("x.db.example", False)])
def test_hosts_that_a_certificate_covers(authority: Path, host: str, covered: bool) -> None:
    certs.create_node(authority, "n1", hosts=["10.0.0.7", "db.example", "*.wild.example"])
    problem = certs.uncovered_host(files_of(authority, "n1"), host)
    assert (problem == "") is covered
    assert covered or host in problem


def test_files_that_do_not_belong_together(authority: Path, tmp_path: Path) -> None:
    certs.create_node(authority, "n1")
    certs.create_node(authority, "n2")
    certs.create_client(authority, "n3")
    certs.create_ca(tmp_path / "other")
    n1, n2 = files_of(authority, "n1"), files_of(authority, "n2")
    with pytest.raises(ConfigError, match="not the private key"):
        certs.check_node_files(dataclasses.replace(n1, key=n2.key), "n1")
    with pytest.raises(ConfigError, match=r"self-signed certificate|unable to get .*issuer"):
        certs.check_node_files(dataclasses.replace(n1, ca=tmp_path / "other" / "ca.crt"), "n1")
    with pytest.raises(ConfigError, match="not a certificate of node n2"):
        certs.check_node_files(n1, "n2")
    with pytest.raises(ConfigError, match="not a certificate of node n3"):
        certs.check_node_files(files_of(authority, "n3"), "n3")


@pytest.mark.parametrize("begins_in_days", [1, -826, -4000])
def test_a_certificate_out_of_its_time_is_refused(tmp_path: Path, begins_in_days: int) -> None:
    begins = NOW + datetime.timedelta(days=begins_in_days)
    certs.create_ca(tmp_path, now=begins)
    certs.create_node(tmp_path, "n1", now=begins)
    with pytest.raises(ConfigError, match=r"^--tls-cert .*n1\.crt is valid from"):
        certs.check_node_files(files_of(tmp_path, "n1"), "n1")


def handshake(server_pair: CertificatePair, client_pair: CertificatePair, ca: Path,
              name: str) -> object:
    """The subject that the server sees, after mutual TLS on a socket pair."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, pair in ((server, server_pair), (client, client_pair)):
        context.load_cert_chain(pair.cert, pair.key)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    left, right = socket.socketpair()
    seen: list[object] = []

    def serve() -> None:
        try:
            with server.wrap_socket(left, server_side=True) as connection:
                certificate = connection.getpeercert() or {}
                seen.append(certificate.get("subject"))
                connection.recv(1)
        except OSError as error:
            seen.append(error)
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(right, server_hostname=name) as connection:
            connection.send(b"x")
    finally:
        right.close()
        thread.join(10)
    return seen[0]


def test_nodes_verify_each_other_by_id(authority: Path) -> None:
    n1, n2 = (certs.create_node(authority, node_id) for node_id in ("n1", "n2"))
    assert handshake(n1, n2, authority / "ca.crt", "n1") == ((("commonName", "n2"),),)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(n1, n2, authority / "ca.crt", "n2")


def test_a_client_certificate_does_not_verify_as_a_server(authority: Path) -> None:
    n1, alice = certs.create_node(authority, "n1"), certs.create_client(authority, "alice")
    assert handshake(n1, alice, authority / "ca.crt", "n1") == ((("commonName", "alice"),),)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(alice, n1, authority / "ca.crt", "alice")


def test_a_foreign_authority_does_not_verify(authority: Path, tmp_path: Path) -> None:
    certs.create_ca(tmp_path / "other")
    n1 = certs.create_node(authority, "n1")
    stranger = certs.create_node(tmp_path / "other", "n2")
    seen = None
    try:
        seen = handshake(n1, stranger, authority / "ca.crt", "n1")
    except OSError:
        return  # the client may learn of the refusal first
    assert isinstance(seen, ssl.SSLError)
