"""Real links: who is let in, what ends a connection, and what a reconnect may deliver."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from elastickv import certs
from elastickv.certs import create_ca, create_client, create_node, pair_paths
from elastickv.config import TlsFiles, is_ip_address
from elastickv.errors import BindFailed, ConfigError
from elastickv.raft import name_lookup, tls_links
from elastickv.raft.frames import PROTOCOL_VERSION, Hello, Vote, encode_message, frame
from elastickv.raft.name_lookup import ThreadedNameLookup
from elastickv.raft.tls_links import (
    MAX_GREETING_BYTES,
    TlsLinks,
    certificate_names,
    split_address,
)
from elastickv.tls import link_context


def files_of(directory: Path, name: str) -> TlsFiles:
    pair = pair_paths(directory, name)
    return TlsFiles(pair.cert, pair.key, pair_paths(directory, "ca").cert)


class Recorder:
    """The events of one end, in order."""

    def __init__(self, node_id: str, cluster_id: str = "") -> None:
        self.node_id, self.cluster_id = node_id, cluster_id
        self.events: list[tuple[str, ...] | tuple[str, str, bytes]] = []
        self.parts: Counter[str] = Counter()

    def make_hello(self, peer_id: str) -> Hello:
        return Hello(PROTOCOL_VERSION, self.cluster_id, self.node_id, f"client-{self.node_id}", 1,
                     1, 0, False, None)

    def connected(self, peer_id: str, hello: Hello) -> None:
        self.events.append(("connected", peer_id))

    def disconnected(self, peer_id: str) -> None:
        self.events.append(("disconnected", peer_id))

    def receiving(self, peer_id: str) -> None:
        self.parts[peer_id] += 1

    def received(self, peer_id: str, body: bytes) -> None:
        self.events.append(("received", peer_id, body))


Make = Callable[..., "asyncio.Future[tuple[TlsLinks, Recorder]]"]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[TlsLinks] = []

    async def start(node_id: str, tls: TlsFiles | None = None, *, address: str = "127.0.0.1:0",
                    cluster_id: str = "", dial_from: str = "") -> tuple[TlsLinks, Recorder]:
        links = TlsLinks(node_id, address, tls=tls, max_entry_bytes=1 << 20, dial_from=dial_from)
        recorder = Recorder(node_id, cluster_id)
        await links.start(recorder)
        made.append(links)
        return links, recorder

    yield start
    for links in made:
        await links.stop()


def address_of(links: TlsLinks) -> str:
    return f"127.0.0.1:{links.port}"


async def joined(first: TlsLinks, second: TlsLinks, *recorders: Recorder,
                 until: Callable[..., object]) -> None:
    first.set_peers({second.node_id: address_of(second)})
    second.set_peers({first.node_id: address_of(first)})
    await until(lambda: all(("connected", peer) in recorder.events for recorder, peer in zip(
        recorders, (second.node_id, first.node_id), strict=True)))


@pytest.mark.parametrize("secure", [True, False])
async def test_frames_arrive_in_order_both_ways(make, until, certificates, secure):
    one, heard_one = await make("n1", files_of(certificates, "n1") if secure else None)
    two, heard_two = await make("n2", files_of(certificates, "n2") if secure else None)
    await joined(one, two, heard_one, heard_two, until=until)
    bodies = [b"%d" % number * (number * 50 + 1) for number in range(100)]
    for body in bodies:
        assert one.send("n2", body)
        assert two.send("n1", body)
    await until(lambda: len(heard_one.events) == len(heard_two.events) == 101)
    assert [event[2] for event in heard_two.events[1:]] == bodies
    assert [event[2] for event in heard_one.events[1:]] == bodies


@pytest.mark.parametrize("secure", [True, False])
async def test_what_was_sent_before_a_link_is_dropped_arrives(make, until, certificates, secure):
    """Whoever leaves says so, and hands over, just before it halts."""
    one, heard_one = await make("n1", files_of(certificates, "n1") if secure else None)
    two, heard_two = await make("n2", files_of(certificates, "n2") if secure else None)
    await joined(one, two, heard_one, heard_two, until=until)
    one.set_peers({})
    two.set_peers({})
    assert one.send("n2", b"last words")
    one.drop("n2")
    one.flush()
    await until(lambda: ("disconnected", "n1") in heard_two.events)
    assert heard_two.events == [("connected", "n1"), ("received", "n1", b"last words"),
                                ("disconnected", "n1")]
    assert heard_one.events == [("connected", "n2"), ("disconnected", "n2")]


async def test_link_comes_back_after_the_peer_restarts(make, until):
    one, heard_one = await make("n1")
    two, heard_two = await make("n2")
    await joined(one, two, heard_one, heard_two, until=until)
    await two.stop()
    await until(lambda: heard_one.events[-1] == ("disconnected", "n2"))
    assert not one.send("n2", b"x")
    again, heard_again = await make("n2", address=address_of(two))
    await until(lambda: heard_one.events.count(("connected", "n2")) == 2)
    assert one.send("n2", b"x")
    await until(lambda: ("received", "n1", b"x") in heard_again.events)
    assert again.port == two.port


async def test_a_name_that_is_looked_up_for_long_delays_no_other_peer(make, until, monkeypatch):
    dead, answered = [], threading.Event()

    def look_up(host: str) -> list[str]:
        if host == "dead.example":
            dead.append(host)
            answered.wait()
            raise OSError("no server answered")
        return ["::1", "127.0.0.1"]

    monkeypatch.setattr(name_lookup, "look_up", look_up)
    monkeypatch.setattr(tls_links, "DIAL_TIMEOUT_S", 0.01)
    one, _ = await make("n1")
    two, heard_two = await make("n2")
    one.set_peers({"n3": "dead.example:1"})
    await until(lambda: "n3" in one._complained and not one._dialling)
    one.set_peers({"n3": "dead.example:1", "n2": f"n2.example:{two.port}"})
    two.set_peers({"n1": address_of(one)})
    await until(lambda: ("connected", "n1") in heard_two.events)
    assert dead == ["dead.example"], "one lookup at a time"
    answered.set()
    await until(lambda: len(dead) > 1)


def test_a_loop_does_not_wait_for_a_name_at_its_end(monkeypatch):
    answered = threading.Event()

    def look_up(host: str) -> list[str]:
        answered.wait()
        return [host]

    monkeypatch.setattr(name_lookup, "look_up", look_up)

    async def give_up() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await ThreadedNameLookup().addresses("dead.example")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(give_up())
    answered.set()


@pytest.mark.parametrize(("host", "is_one"), [
    ("10.0.0.1", True), ("::1", True), ("fe80::1%eth0", True), ("localhost", False),
    ("1.2.3", False), ("n1.example.com", False)])
def test_what_needs_no_lookup(host, is_one):
    assert is_ip_address(host) is is_one


def test_a_name_without_address_is_an_os_error():
    for host in ("n1.invalid", "a" * 70 + ".example"):
        with pytest.raises(OSError, match=r"."):
            name_lookup.look_up(host)


async def test_an_address_that_is_none_can_be_corrected(make, until):
    one, heard_one = await make("n1")
    two, _ = await make("n2")
    two.set_peers({"n1": "nowhere"})
    await until(lambda: "n1" in two._complained)
    two.set_peers({"n1": address_of(one)})
    await until(lambda: ("connected", "n2") in heard_one.events)


async def test_node_with_the_higher_id_dials_when_the_other_does_not_know_it(make, until):
    one, heard_one = await make("n1")
    two, _ = await make("n2")
    two.set_peers({"n1": address_of(one)})
    await until(lambda: ("connected", "n2") in heard_one.events)


async def test_a_node_dials_from_the_host_that_it_was_given(make, until):
    dialled_from = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled_from.append(writer.get_extra_info("peername")[0])
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for host in ("", "127.0.0.77"):
        links, _ = await make("n1", dial_from=host)
        links.set_peers({"n2": f"127.0.0.1:{port}"})
        await until(lambda seen=host or "127.0.0.1": seen in dialled_from)
        await links.stop()
    server.close()


# --- who is let in --------------------------------------------------------------------------------


async def refused(honest: TlsLinks, heard: Recorder, other: TlsLinks, seen: list[str],
                  until: Callable[..., object]) -> None:
    """Both dial; the refusal is logged, and the honest one never has a link."""
    honest.set_peers({other.node_id: address_of(other)})
    other.set_peers({honest.node_id: address_of(honest)})
    await until(lambda: bool(seen))
    assert heard.events == []


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was logged of connections that were refused or failed."""
    seen: list[str] = []

    class Log:
        def warning(self, event: str, **fields: object) -> None:
            seen.append(f"{event}: {fields.get('error')}")

    monkeypatch.setattr(tls_links, "log", Log())
    return seen


async def test_certificate_of_another_authority_is_refused(make, until, certificates, tmp_path,
                                                           refusals):
    create_ca(tmp_path)
    create_node(tmp_path, "n2")
    one, heard_one = await make("n1", files_of(certificates, "n1"))
    two, _ = await make("n2", files_of(tmp_path, "n2"))
    await refused(one, heard_one, two, refusals, until)


async def test_node_that_claims_another_id_is_refused(make, until, certificates, refusals):
    one, heard_one = await make("n1", files_of(certificates, "n1"))
    two, _ = await make("n2", files_of(certificates, "n3"))
    await refused(one, heard_one, two, refusals, until)
    await until(lambda: any("certificate is not for 'n2'" in line for line in refusals))


async def test_client_certificate_is_no_node(make, until, certificates, refusals, tmp_path):
    """A client called n2 has the common name of the node n2, but not its DNS name."""
    create_ca(tmp_path)
    create_node(tmp_path, "n1")
    create_client(tmp_path, "n2")
    one, heard_one = await make("n1", files_of(tmp_path, "n1"))
    two, _ = await make("n2", files_of(tmp_path, "n2"))
    await refused(one, heard_one, two, refusals, until)


@pytest.mark.parametrize("name", [x509.DNSName("n2"), x509.UniformResourceIdentifier("n2")],
                         ids=["DNS", "URI"])
async def test_a_client_certificate_with_a_name_is_no_node(make, until, refusals, tmp_path, name):
    """Other tools give every certificate a name; what a client's lacks is the server usage."""
    create_ca(tmp_path)
    create_node(tmp_path, "n1")
    certs._create_leaf(tmp_path, "n2", [ExtendedKeyUsageOID.CLIENT_AUTH], [name], 30, None)
    one, heard_one = await make("n1", files_of(tmp_path, "n1"))
    two, _ = await make("n2", files_of(tmp_path, "n2"))
    # It dials alone: whoever dials it sees by the handshake that it is no server.
    two.set_peers({"n1": address_of(one)})
    await until(lambda: any("none of a node" in line for line in refusals))
    assert heard_one.events == []


async def test_plain_peer_cannot_speak_to_a_secure_one(make, until, certificates, refusals):
    one, heard_one = await make("n1", files_of(certificates, "n1"))
    two, _ = await make("n2")
    await refused(one, heard_one, two, refusals, until)


async def test_other_cluster_is_refused(make, until, refusals):
    one, heard_one = await make("n1", cluster_id="blue")
    two, _ = await make("n2")
    await refused(one, heard_one, two, refusals, until)
    await until(lambda: any("another cluster" in line for line in refusals))


async def test_own_id_is_refused(make, until, refusals):
    one, heard_one = await make("n1")
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
    writer.write(frame(encode_message(Recorder("n1").make_hello(""))))
    assert await reader.read() == b""
    assert heard_one.events == []
    writer.close()


def test_names_of_a_certificate():
    assert certificate_names({
        "subject": ((("commonName", "n9"),),),
        "subjectAltName": (("DNS", "n1"), ("DNS", "localhost"), ("URI", "node:n1"),
                           ("IP Address", "127.0.0.1"))}) == {"n1", "node:n1"}
    assert certificate_names({}) == set()


# --- who has not greeted --------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["plain", "handshakes", "after the handshake"])
async def test_strangers_hold_few_descriptors_and_keep_no_member_out(make, until, certificates,
                                                                     monkeypatch, kind):
    monkeypatch.setattr(tls_links, "MAX_STRANGERS", 4)
    secure = kind != "plain"
    context = link_context(files_of(certificates, "n3"), server=False) \
        if kind == "after the handshake" else None
    one, heard_one = await make("n1", files_of(certificates, "n1") if secure else None)
    two, heard_two = await make("n2", files_of(certificates, "n2") if secure else None)
    await joined(one, two, heard_one, heard_two, until=until)
    before, ended = descriptors(), []
    strangers = []

    async def wait_for_end(number: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass
        ended.append(number)

    for number in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, ssl=context)
        strangers.append((writer, asyncio.ensure_future(wait_for_end(number, reader))))
    await until(lambda: sorted(ended) == list(range(16)))
    assert descriptors() <= before + 2 * 4 + 16
    three, heard_three = await make("n3", files_of(certificates, "n3") if secure else None)
    # The one that is crowded does not dial, so that the other has to come in.
    three.set_peers({"n1": address_of(one)})
    await until(lambda: ("connected", "n3") in heard_one.events
                and ("connected", "n1") in heard_three.events)
    assert two.send("n1", b"still here")
    await until(lambda: ("received", "n2", b"still here") in heard_one.events)
    await one.stop()
    for _, waiting in strangers:
        await waiting
    for writer, _ in strangers:
        writer.close()
    await until(lambda: descriptors() <= before)


async def test_a_stop_ends_handshakes(make, until, certificates):
    one, _ = await make("n1", files_of(certificates, "n1"))
    before = descriptors()
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
    await until(lambda: bool(one._strangers))
    await one.stop()
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
    await until(lambda: descriptors() <= before)


# --- what ends a connection -----------------------------------------------------------------------


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("garbage", [
    b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 8, b"\x00\x00\x00\x02\xff\xff",
    frame(encode_message(Vote(1))), b"\xff" * 64], ids=["http", "bytes", "frame", "vote", "ff"])
async def test_random_bytes_end_that_connection_only(make, until, certificates, secure, garbage,
                                                     monkeypatch):
    monkeypatch.setattr(tls_links, "GREETING_TIMEOUT_S", 1.0)
    one, heard_one = await make("n1", files_of(certificates, "n1") if secure else None)
    two, heard_two = await make("n2", files_of(certificates, "n2") if secure else None)
    await joined(one, two, heard_one, heard_two, until=until)
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
    writer.write(garbage)
    async with asyncio.timeout(10):
        while await reader.read(4096):
            pass
    writer.close()
    assert two.send("n1", b"still here")
    await until(lambda: ("received", "n2", b"still here") in heard_one.events)
    assert heard_one.events == [("connected", "n2"), ("received", "n2", b"still here")]


async def greeted_connection(links: TlsLinks, node_id: str) -> tuple[
        asyncio.StreamReader, asyncio.StreamWriter]:
    """A plain connection that has greeted as `node_id`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", links.port)
    writer.write(frame(encode_message(Recorder(node_id).make_hello("n1"))))
    await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
    return reader, writer


async def test_parts_of_a_message_are_told_of_as_they_come(make, until):
    one, heard_one = await make("n1")
    _, writer = await greeted_connection(one, "n7")
    body, part_bytes = bytes(1 << 19), 1 << 17
    data = frame(body)
    for offset in range(0, len(body), part_bytes):
        told = heard_one.parts["n7"]
        writer.write(data[offset:offset + part_bytes])
        await until(lambda told=told: heard_one.parts["n7"] > told)
    assert heard_one.events == [("connected", "n7")]
    writer.write(data[len(body):])
    await until(lambda: heard_one.events == [("connected", "n7"), ("received", "n7", body)])
    told = heard_one.parts["n7"]
    writer.write(frame(b"whole"))
    await until(lambda: heard_one.events[-1] == ("received", "n7", b"whole"))
    assert heard_one.parts["n7"] == told
    writer.close()


@pytest.mark.parametrize("secure", [True, False])
async def test_a_large_message_comes_in_parts(make, until, certificates, secure):
    one, heard_one = await make("n1", files_of(certificates, "n1") if secure else None)
    two, heard_two = await make("n2", files_of(certificates, "n2") if secure else None)
    await joined(one, two, heard_one, heard_two, until=until)
    body = bytes(1 << 20)
    assert one.send("n2", body)
    await until(lambda: heard_two.events[-1] == ("received", "n1", body))
    assert heard_two.parts["n1"]
    assert not heard_one.parts


async def test_parts_count_for_a_peer_on_its_current_connection_only(make, until):
    one, heard_one = await make("n1")
    _, writer = await asyncio.open_connection("127.0.0.1", one.port)
    greeting = frame(encode_message(Recorder("n7").make_hello("n1")))
    writer.write(greeting[:-1])
    await until(lambda: any(connection._decoder.holds_part() for connection in one._open))
    writer.write(greeting[-1:])
    await until(lambda: bool(heard_one.events))
    old = one._current["n7"]
    await greeted_connection(one, "n7")
    await until(lambda: len(heard_one.events) == 3)
    old.data_received(frame(b"late")[:-1])
    assert not heard_one.parts
    writer.close()


async def test_oversized_frame_ends_the_connection(make, until):
    one, heard_one = await make("n1")
    reader, writer = await greeted_connection(one, "n7")
    writer.write((1 << 30).to_bytes(4, "big"))
    async with asyncio.timeout(10):
        while await reader.read(4096):
            pass
    await until(lambda: heard_one.events == [("connected", "n7"), ("disconnected", "n7")])
    writer.close()


async def test_new_connection_ends_the_old_one_before_it_delivers(make, until):
    one, heard_one = await make("n1")
    _, old = await greeted_connection(one, "n7")
    old.write(frame(b"old 1"))
    await until(lambda: ("received", "n7", b"old 1") in heard_one.events)
    _, new = await greeted_connection(one, "n7")
    new.write(frame(b"new 1"))
    old.write(frame(b"old 2"))
    await until(lambda: ("received", "n7", b"new 1") in heard_one.events)
    new.write(frame(b"new 2"))
    await until(lambda: ("received", "n7", b"new 2") in heard_one.events)
    assert heard_one.events == [
        ("connected", "n7"), ("received", "n7", b"old 1"), ("disconnected", "n7"),
        ("connected", "n7"), ("received", "n7", b"new 1"), ("received", "n7", b"new 2")]
    old.close()
    new.close()


async def test_bytes_of_the_old_connection_in_the_same_read_are_dropped(make, until, monkeypatch):
    """The old connection's bytes may have been read already when the new one greets."""
    one, heard_one = await make("n1")
    await greeted_connection(one, "n7")
    await until(lambda: bool(heard_one.events))
    old = one._current["n7"]
    await greeted_connection(one, "n7")
    await until(lambda: len(heard_one.events) == 3)
    old.data_received(frame(b"late"))
    assert heard_one.events == [("connected", "n7"), ("disconnected", "n7"), ("connected", "n7")]


async def test_silent_peer_is_dropped_and_a_pinging_one_is_not(make, until, monkeypatch):
    monkeypatch.setattr(tls_links, "PING_S", 0.02)
    one, heard_one = await make("n1")
    two, heard_two = await make("n2")
    await joined(one, two, heard_one, heard_two, until=until)
    await greeted_connection(one, "n7")
    await until(lambda: ("disconnected", "n7") in heard_one.events)
    assert ("disconnected", "n2") not in heard_one.events


async def test_peer_that_does_not_read_is_dropped(make, until, monkeypatch):
    monkeypatch.setattr(tls_links, "QUEUE_BYTES", 1 << 20)
    one, heard_one = await make("n1")
    await greeted_connection(one, "n7")
    await until(lambda: bool(heard_one.events))
    while one.send("n7", bytes(1 << 20)):
        one.flush()
        await asyncio.sleep(0)
    await until(lambda: ("disconnected", "n7") in heard_one.events)


async def test_one_message_of_the_largest_size_is_no_sign_of_a_peer_that_does_not_read(
        make, until, monkeypatch):
    monkeypatch.setattr(tls_links, "QUEUE_BYTES", 1 << 20)
    one, heard_one = await make("n1")
    _reader, _writer = await greeted_connection(one, "n7")
    await until(lambda: bool(heard_one.events))
    largest = bytes(one.max_frame_bytes)
    connection = one._current["n7"]
    while connection.backlog() <= 1 << 18:
        assert one.send("n7", bytes(1 << 17))
        one.flush()
    assert one.send("n7", largest)
    one.flush()
    assert connection.backlog() > 1 << 20
    assert one.send("n7", b"after it")


async def test_taken_port_is_a_bind_failure(make):
    one, _ = await make("n1")
    with pytest.raises(BindFailed, match="raftAddress"):
        await make("n2", address=address_of(one))


@pytest.mark.parametrize(("address", "expected"), [
    ("host:1", ("host", 1)), ("[::1]:80", ("::1", 80)), ("host", None), ("host:", None),
    ("host:x", None)])
def test_addresses(address, expected):
    if expected is None:
        with pytest.raises(ConfigError):
            split_address(address)
    else:
        assert split_address(address) == expected


def test_unusable_tls_files_are_a_configuration_error(tmp_path, certificates):
    with pytest.raises(ConfigError, match="tls-cert"):
        TlsLinks("n1", "127.0.0.1:0", tls=files_of(tmp_path, "n1"), max_entry_bytes=1)
    context = link_context(files_of(certificates, "n1"), server=True)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3


async def test_nobody_makes_a_node_keep_more_than_a_greeting_before_it_has_greeted(
        make, until, certificates, refusals):
    one, _ = await make("n1", files_of(certificates, "n1"))
    context = link_context(files_of(certificates, "n2"), server=False)
    _, writer = await asyncio.open_connection("127.0.0.1", one.port, ssl=context)
    writer.write((MAX_GREETING_BYTES + 1).to_bytes(4, "big"))
    await until(lambda: any("is outside 1 to" in line for line in refusals))
    await until(lambda: not one._open)
    writer.close()


async def test_a_certificate_of_no_node_ends_the_connection_at_once(make, until, refusals,
                                                                    tmp_path):
    create_ca(tmp_path)
    create_node(tmp_path, "n1")
    create_client(tmp_path, "somebody")
    one, _ = await make("n1", files_of(tmp_path, "n1"))
    _, writer = await asyncio.open_connection(
        "127.0.0.1", one.port, ssl=link_context(files_of(tmp_path, "somebody"), server=False))
    await until(lambda: any("none of a node" in line for line in refusals))
    await until(lambda: not one._open)
    writer.close()


async def test_a_greeting_and_a_large_frame_may_come_together(make, until):
    one, heard_one = await make("n1")
    _, writer = await asyncio.open_connection("127.0.0.1", one.port)
    body = bytes(2 * MAX_GREETING_BYTES)
    writer.write(frame(encode_message(Recorder("n7").make_hello("n1"))) + frame(body))
    await until(lambda: ("received", "n7", body) in heard_one.events)
    writer.close()
