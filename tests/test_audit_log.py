"""elastickv.audit and elastickv.server.audited: one line for each administrative call."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from elastickv import audit, certs, logs
from elastickv.audit import AuditLog
from elastickv.config import TlsFiles
from elastickv.errors import ConfigError, InvalidArgument, NotLeader
from elastickv.pb import encryption_admin_pb2 as keys_pb
from elastickv.pb import service_pb2 as pb
from elastickv.pb import service_pb2_grpc as pb_grpc
from elastickv.server.aio_front import AioFront
from elastickv.server.audited import audited, first_of, key_ids_of
from elastickv.server.grpc_server import FRONT_GRPC, FRONT_H2, make_front
from elastickv.server.h2.front import H2Front
from elastickv.server.methods import ADMINISTRATIVE, READS, Unary, parse_request, unary

NOW = "2026-03-01T09:30:00.125Z"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def log(path: Path) -> Iterator[AuditLog]:
    opened = AuditLog(path, now=lambda: NOW)
    yield opened
    opened.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(log: AuditLog, what: str = "S/M", target: str = "") -> None:
    log.record(what=what, target=target, key_ids=[3], result="ok", applied_index=7)


def test_a_line_has_every_field_and_the_file_is_the_owners(log: AuditLog, path: Path) -> None:
    record(log, target="n2\n{}")
    assert lines(path) == [{"time": NOW, "who": "", "what": "S/M", "target": "n2\n{}",
                            "key_ids": [3], "result": "ok", "applied_index": 7}]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_time_is_rfc_3339_in_utc() -> None:
    assert audit.utc_now()[10] == "T"
    assert audit.utc_now().endswith("Z")
    assert len(audit.utc_now()) == len(NOW)


def test_lines_are_appended_over_restarts(log: AuditLog, path: Path) -> None:
    record(log, "S/First")
    again = AuditLog(path)
    record(again, "S/Second")
    again.close()
    assert [line["what"] for line in lines(path)] == ["S/First", "S/Second"]


@pytest.mark.parametrize("removed", [False, True], ids=["renamed", "removed"])
def test_a_file_that_was_moved_away_is_opened_anew(log: AuditLog, path: Path,
                                                   removed: bool) -> None:
    record(log, "S/Old")
    old = path.with_suffix(".1")
    path.rename(old)
    if removed:
        old.unlink()
    record(log, "S/New")
    assert [line["what"] for line in lines(path)] == ["S/New"]


def test_a_torn_line_does_not_swallow_the_next(path: Path) -> None:
    path.write_bytes(b'{"time":"2026')
    log = AuditLog(path)
    record(log)
    log.close()
    torn, whole = path.read_bytes().splitlines()
    assert torn == b'{"time":"2026'
    assert json.loads(whole)["what"] == "S/M"


def test_a_line_that_does_not_fit_is_logged_and_the_next_is_whole(
        log: AuditLog, path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the first line is cut, then refused."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, old[1]))
        with capture_logs() as logged:
            record(log, "S/Cut")
            record(log, "S/Refused")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    record(log, "S/Whole")
    cut, whole = path.read_bytes().splitlines()
    assert len(cut) == 20
    assert json.loads(whole)["what"] == "S/Whole"
    assert [(event["event"], event["line"]["what"]) for event in logged] == [
        ("the audit log cannot be written", "S/Cut"),
        ("the audit log cannot be written", "S/Refused")]


@pytest.mark.timeout(20)
def test_a_pipe_that_nobody_reads_keeps_no_call_waiting(path: Path) -> None:
    os.mkfifo(path)
    log = AuditLog(path)
    with capture_logs() as logged:
        for _ in range(1_000):
            record(log, "S/M")
    assert {event["event"] for event in logged} == {"the audit log cannot be written"}
    reader = os.open(path, os.O_RDONLY)
    read = os.read(reader, 1 << 20)
    record(log, "S/Read")
    read += os.read(reader, 1 << 20)
    os.close(reader)
    log.close()
    assert [json.loads(line)["what"] for line in read.splitlines()] == [
        *["S/M"] * (1_000 - len(logged)), "S/Read"]


@pytest.fixture
def full_log() -> Iterator[None]:
    """Log lines that go to a full disk."""
    with open("/dev/full", "w") as stream:
        logs.configure(stream=stream)
        try:
            yield
        finally:
            logs.configure()


async def test_a_call_succeeds_although_neither_log_can_be_written(full_log: None) -> None:
    log = AuditLog(Path("/dev/full"))
    plain = unary(rotate, keys_pb.RotateDEKRequest, keys_pb.RotateDEKResponse)
    method = audited({"EncryptionAdmin": {"RotateDEK": plain}}, log)["EncryptionAdmin"]["RotateDEK"]
    assert isinstance(method, Unary)
    response = await method.call(keys_pb.RotateDEKRequest(), 1.0)
    assert response.new_dek_id == 3
    log.close()


def test_a_path_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--audit-log"):
        AuditLog(tmp_path / "absent" / "audit.log")


@pytest.mark.parametrize(("messages", "ids"), [
    ((keys_pb.RotateDEKRequest(), keys_pb.RotateDEKResponse(new_dek_id=3)), [3]),
    ((keys_pb.BootstrapEncryptionRequest(),
      keys_pb.BootstrapEncryptionResponse(storage_dek_id=2, raft_dek_id=1)), [1, 2]),
    ((keys_pb.RegisterEncryptionWriterRequest(dek_id=9), None), [9]),
    ((keys_pb.ResyncSidecarResponse(wrapped_deks_by_id={5: b"x", 4: b"y"}),), [4, 5]),
    ((pb.RaftAdminAddVoterRequest(id="n4"), None), []),
])
def test_key_ids_come_from_request_and_response(messages: tuple[Any, ...],
                                                ids: list[int]) -> None:
    assert key_ids_of(*messages) == ids


def test_the_first_field_that_is_set_counts() -> None:
    request = pb.RaftAdminTransferLeadershipRequest(target_address="127.0.0.1:1")
    assert first_of(request, ("id", "target_id", "target_address"), "") == "127.0.0.1:1"
    assert first_of(None, ("index",), 0) == 0


async def rotate(request: keys_pb.RotateDEKRequest,
                 timeout_s: float) -> keys_pb.RotateDEKResponse:
    match request.proposer_local_epoch:
        case 1:
            raise NotLeader
        case 2:
            raise asyncio.CancelledError
        case _:
            return keys_pb.RotateDEKResponse(applied_index=11, new_dek_id=3)


@pytest.mark.parametrize(("epoch", "result", "index", "ids"), [
    (0, "ok", 11, [3]), (1, "NotLeader", 0, []), (2, "CancelledError", 0, [])])
async def test_results_and_errors_pass_through(log: AuditLog, path: Path, epoch: int, result: str,
                                               index: int, ids: list[int]) -> None:
    plain = unary(rotate, keys_pb.RotateDEKRequest, keys_pb.RotateDEKResponse)
    services = audited({"EncryptionAdmin": {"RotateDEK": plain}, "RawKV": {"RawGet": plain}}, log)
    assert services["RawKV"]["RawGet"] is plain
    method = services["EncryptionAdmin"]["RotateDEK"]
    assert isinstance(method, Unary)
    raised: list[str] = []
    try:
        await method.call(keys_pb.RotateDEKRequest(proposer_local_epoch=epoch), 1.0)
    except (NotLeader, asyncio.CancelledError) as error:
        raised.append(type(error).__name__)
    assert raised == ([] if result == "ok" else [result])
    assert [(line["what"], line["result"], line["applied_index"], line["key_ids"])
            for line in lines(path)] == [("EncryptionAdmin/RotateDEK", result, index, ids)]


def methods_of(service: str) -> set[str]:
    """Every method in the service's definition."""
    (descriptor,) = (file.services_by_name[service] for file in (keys_pb.DESCRIPTOR, pb.DESCRIPTOR)
                     if service in file.services_by_name)
    return {method.name for method in descriptor.methods}


async def test_every_method_of_the_administrative_services_writes_a_line(
        log: AuditLog, path: Path) -> None:
    plain = unary(rotate, keys_pb.RotateDEKRequest, keys_pb.RotateDEKResponse)
    everything = {service: dict.fromkeys(methods_of(service), plain) for service in ADMINISTRATIVE}
    wrapped = audited(everything, log)
    for methods in wrapped.values():
        for method in methods.values():
            assert isinstance(method, Unary)
            await method.call(keys_pb.RotateDEKRequest(), 1.0)
    assert {line["what"] for line in lines(path)} == {
        f"{service}/{name}" for service, names in everything.items() for name in names}
    assert {line["what"].rpartition("/")[2] for line in lines(path)
            if line["applied_index"] == 0} == READS
    assert set().union(*map(methods_of, ADMINISTRATIVE)) >= READS


async def test_a_request_that_does_not_parse_is_recorded(log: AuditLog, path: Path) -> None:
    (method,) = audited({"RaftAdmin": {"AddVoter": unary(
        add_voter, pb.RaftAdminAddVoterRequest, pb.RaftAdminConfigurationChangeResponse)}},
        log)["RaftAdmin"].values()
    with pytest.raises(InvalidArgument):
        parse_request(method.parse, b"\xff")
    (line,) = lines(path)
    assert (line["what"], line["result"]) == ("RaftAdmin/AddVoter", "InvalidArgument")


def test_key_ids_are_found_in_the_rows_of_members() -> None:
    report = keys_pb.MemberStatusReport(members=[keys_pb.MemberStatus(
        sidecar=keys_pb.SidecarStateReport(wrapped_deks_by_id={7: b"w", 3: b"w"}))])
    assert key_ids_of(keys_pb.Empty(), report) == [3, 7]


async def add_voter(request: pb.RaftAdminAddVoterRequest,
                    timeout_s: float) -> pb.RaftAdminConfigurationChangeResponse:
    return pb.RaftAdminConfigurationChangeResponse(index=5)


async def call_add_voter(front: AioFront | H2Front, tls: TlsFiles | None,
                         credentials: grpc.ChannelCredentials | None) -> None:
    port = await front.start("127.0.0.1", 0, tls)
    address = f"127.0.0.1:{port}"
    channel = (grpc.aio.secure_channel(address, credentials) if credentials
               else grpc.aio.insecure_channel(address))
    try:
        async with channel:
            await pb_grpc.RaftAdminStub(channel).AddVoter(
                pb.RaftAdminAddVoterRequest(id="n4", address="127.0.0.1:9"), timeout=5)
    finally:
        await front.stop(0.0)


@pytest.mark.parametrize("name", [FRONT_GRPC, FRONT_H2])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
async def test_both_fronts_say_who_called(log: AuditLog, path: Path, tmp_path: Path, name: str,
                                          encrypted: bool) -> None:
    tls = credentials = None
    if encrypted:
        certs.create_ca(tmp_path / "ca")
        certs.create_node(tmp_path / "ca", "n1")
        certs.create_client(tmp_path / "ca", "alice")
        node, alice = (certs.pair_paths(tmp_path / "ca", who) for who in ("n1", "alice"))
        authority = tmp_path / "ca" / "ca.crt"
        tls = TlsFiles(node.cert, node.key, authority)
        credentials = grpc.ssl_channel_credentials(
            authority.read_bytes(), alice.key.read_bytes(), alice.cert.read_bytes())
    services = audited({"RaftAdmin": {"AddVoter": unary(
        add_voter, pb.RaftAdminAddVoterRequest, pb.RaftAdminConfigurationChangeResponse)}}, log)
    front = make_front(name, services, accept_loops=1, max_message_bytes=1 << 20)
    await call_add_voter(front, tls, credentials)
    (line,) = lines(path)
    assert (line["what"], line["target"], line["applied_index"]) == ("RaftAdmin/AddVoter", "n4", 5)
    if encrypted:
        assert line["who"] == "alice"
    else:
        host, _, port = line["who"].rpartition(":")
        assert host == "127.0.0.1"
        assert 0 < int(port) < 65536
