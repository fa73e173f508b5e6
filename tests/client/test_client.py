"""elastickv.client.Client against real servers: the surface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from memory_node import MAX_VALUE_BYTES, MemoryNode, running

from elastickv import certs
from elastickv.client import (
    Client,
    Condition,
    Delete,
    Pair,
    Purpose,
    Put,
    ReadResult,
    Role,
    TlsFiles,
    Writer,
)
from elastickv.crypto.nonce import full_node_id
from elastickv.errors import (
    ConditionFailed,
    ConfigError,
    EncryptionConflict,
    GateOff,
    IntegrityError,
    InvalidArgument,
    OutcomeUnknown,
    Unreachable,
    WireError,
)


@pytest.fixture
async def node() -> AsyncIterator[MemoryNode]:
    node = MemoryNode()
    async with running(node):
        yield node


@pytest.fixture
async def client(node: MemoryNode) -> AsyncIterator[Client]:
    async with Client([node.address]) as client:
        yield client


# --- keys ------------------------------------------------------------------------------------


async def test_put_get_delete(client: Client) -> None:
    key = b"\x00k\xff"
    assert await client.get(key) == ReadResult(b"", False, 0, 0)
    written = await client.put(key, b"\x00v\xff")
    assert written.commit_index == 1
    assert await client.get(key) == ReadResult(b"\x00v\xff", True, written.commit_ts, 1)
    assert await client.latest_commit_ts(key) == (written.commit_ts, True)
    deleted = await client.delete(key)
    assert deleted.commit_ts > written.commit_ts
    assert not (await client.get(key)).exists
    assert await client.latest_commit_ts(key) == (0, False)
    assert (await client.get(key, ts=written.commit_ts)).value == b"\x00v\xff"


async def test_an_empty_value_exists(client: Client) -> None:
    await client.put(b"k", b"")
    result = await client.get(b"k")
    assert (result.value, result.exists) == (b"", True)


async def test_options_arrive(client: Client, node: MemoryNode) -> None:
    await client.get(b"k", stale=True)
    await client.scan(stale=True)
    assert node.faults.before == ["stale read", "stale read"]
    written = await client.put(b"k", b"v", ttl_ms=1)
    async with asyncio.timeout(5):
        while (await client.get(b"k")).exists:
            await asyncio.sleep(0.002)
    then = await client.get(b"k", ts=written.commit_ts)
    assert (then.exists, then.ttl_ms) == (True, 1)


async def test_batch(client: Client) -> None:
    first = await client.batch([Put(b"a", b"1"), Put(b"b", b"2"), Delete(b"a")],
                               conditions=[Condition(b"a", 0)])
    assert await client.scan() == [Pair(b"b", b"2")]
    with pytest.raises(ConditionFailed):
        await client.batch([Put(b"b", b"3")], conditions=[Condition(b"b", 0)])
    await client.batch([Put(b"b", b"3")], conditions=[Condition(b"b", first.commit_ts)])
    assert (await client.get(b"b")).value == b"3"


async def test_scan(client: Client) -> None:
    await client.batch([Put(b"%d" % n, b"v%d" % n) for n in range(9)])
    assert await client.scan(b"2", b"5") == [Pair(b"%d" % n, b"v%d" % n) for n in (2, 3, 4)]
    assert await client.scan(limit=2, reverse=True, keys_only=True) == [Pair(b"8", b""),
                                                                        Pair(b"7", b"")]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("page", [1, 3, 9, 10, 100])
async def test_pages_make_up_the_range(client: Client, page: int, reverse: bool) -> None:
    await client.batch([Put(b"%d" % n, b"v") for n in range(9)])
    pages = [pairs async for pairs in client.scan_pages(b"1", b"8", page=page, reverse=reverse)]
    assert all(0 < len(pairs) <= page for pairs in pages)
    keys = [pair.key for pairs in pages for pair in pairs]
    assert keys == sorted((b"%d" % n for n in range(1, 8)), reverse=reverse)


async def test_pages_shrink_where_values_are_large(client: Client) -> None:
    for number in range(50):
        await client.put(b"%02d" % number, bytes(MAX_VALUE_BYTES))
    pages = [pairs async for pairs in client.scan_pages(page=100)]
    assert sum(map(len, pages)) == 50
    assert len(pages) > 1


async def test_a_stale_scan_says_how_old_it_is(client: Client, node: MemoryNode) -> None:
    await client.batch([Put(b"%d" % n, b"v") for n in range(4)])
    node.kv.stale_ms = 1234
    ages: list[int] = []
    assert len(await client.scan(stale=True, on_stale_ms=ages.append)) == 4
    assert ages == [1234]
    async for _ in client.scan_pages(page=3, stale=True, on_stale_ms=ages.append):
        node.kv.stale_ms = -1
    assert ages == [1234, 1234, -1]
    await client.scan(on_stale_ms=ages.append)
    assert ages[3:] == [0]


# --- errors ----------------------------------------------------------------------------------


async def test_errors_are_typed_and_carry_the_remedy(client: Client, node: MemoryNode) -> None:
    with pytest.raises(InvalidArgument, match="480") as caught:
        await client.put(b"k" * 481, b"v")
    assert caught.value.remedy
    node.faults.errors.append(IntegrityError("the value does not open", remedy="see the log"))
    with pytest.raises(IntegrityError, match="does not open") as damaged:
        await client.get(b"k")
    assert damaged.value.remedy == "see the log"


async def test_a_deadline_during_a_write_is_an_unknown_outcome(node: MemoryNode) -> None:
    node.faults.hold = asyncio.Event()
    async with Client([node.address]) as client:
        node.faults.errors.append(OutcomeUnknown("proposed, not decided"))
        node.faults.hold.set()
        with pytest.raises(OutcomeUnknown):
            await client.put(b"k", b"v", timeout_s=1)
    assert node.faults.before == ["write"]


@pytest.mark.parametrize("endpoints", [
    [], ["nonsense"], ["127.0.0.1"], ["127.0.0.1:0"], ["127.0.0.1:5", "x:99999"]])
async def test_endpoints_that_are_none(endpoints: list[str]) -> None:
    with pytest.raises(ConfigError):
        Client(endpoints)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
async def test_a_timeout_is_above_zero(timeout_s: float) -> None:
    with pytest.raises(ConfigError):
        Client(["127.0.0.1:5"], timeout_s=timeout_s)


@pytest.mark.parametrize("make", [
    pytest.param(lambda client: client.put(b"k", b"v", ttl_ms=-1), id="negative"),
    pytest.param(lambda client: client.put(b"k", b"v", ttl_ms=1 << 64), id="too large"),
    pytest.param(lambda client: client.batch([Put(b"k", b"v", ttl_ms=-1)]), id="in a batch"),
    pytest.param(lambda client: client.batch([Put(b"k", b"v")], conditions=[Condition(b"k", -1)]),
                 id="in a condition"),
    pytest.param(lambda client: client.scan(ts=1 << 64), id="timestamp"),
    pytest.param(lambda client: client.raft.remove_server("\ud800"), id="no text"),
])
async def test_what_fits_no_field_is_a_typed_error(
        client: Client, make: Callable[[Client], Awaitable[object]]) -> None:
    with pytest.raises(InvalidArgument, match="does not fit its field"):
        await make(client)


async def test_an_error_of_the_callers_own_operations_is_left_alone(client: Client) -> None:
    with pytest.raises(ValueError, match="not a number"):
        await client.batch(Put(b"k", b"v", ttl_ms=int(text)) for text in ("1", "not a number"))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf"), 1e12])
async def test_a_call_has_a_time_that_can_be_counted(client: Client, node: MemoryNode,
                                                     timeout_s: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout_s"):
        await client.get(b"k", timeout_s=timeout_s)
    assert node.faults.before == []


# --- administration --------------------------------------------------------------------------


async def test_encryption(client: Client, node: MemoryNode) -> None:
    calls = client.encryption
    assert (await calls.sidecar_state()).active_storage_id == 0
    made = await calls.bootstrap()
    assert made == (1, 1, 2)
    with pytest.raises(EncryptionConflict):
        await calls.bootstrap()
    assert (await calls.rotate_dek(Purpose.RAFT)).new_dek_id == 3
    assert await calls.register_writers(3, [Writer(full_node_id("n2"), 5)]) == 3
    storage = await calls.enable_storage_envelope()
    assert [member.full_node_id for member in storage.members] == [full_node_id("n1")]
    raft = await calls.enable_raft_envelope()
    assert (raft.was_already_active, raft.applied_index) == (False, 5)
    again = await calls.enable_raft_envelope()
    assert (again.was_already_active, again.applied_index, again.members) == (True, 5, ())
    assert (await calls.enable_storage_envelope()).cutover_index_unknown
    state = await calls.sidecar_state()
    assert (state.active_storage_id, state.active_raft_id) == (1, 3)
    assert state.writer_registry == {1: 1, 2: 1}
    assert (await calls.resync_sidecar(full_node_id("n1"))).wrapped_deks_by_id == \
        state.wrapped_deks_by_id
    assert (await calls.capability()).encryption_capable
    members = {member.node_id: member for member in await calls.members()}
    assert members["n1"].sidecar == state
    assert (members["gone"].reachable, members["gone"].capability) == (False, None)
    assert members["gone"].problems == (members["gone"].problem,) == ("unreachable (no answer)",)
    assert (members["n1"].problem, members["n1"].problems) == ("", ())


async def test_explicit_keys_arrive(client: Client, node: MemoryNode) -> None:
    made = await client.encryption.bootstrap(
        wrapped_storage=b"s" * 60, wrapped_raft=b"r" * 60, storage_dek_id=7, raft_dek_id=8,
        writers=[Writer(full_node_id("n1"), 1)])
    assert made == (1, 7, 8)
    assert node.encryption.state is not None
    assert node.encryption.state.wrapped_deks_by_id == {7: b"s" * 60, 8: b"r" * 60}


async def test_a_gate_that_is_off() -> None:
    node = MemoryNode(gate=False)
    async with running(node), Client([node.address]) as client:
        with pytest.raises(GateOff):
            await client.encryption.bootstrap()
    assert node.encryption.proposals == []


async def test_an_epoch_that_fits_no_nonce_is_not_believed(client: Client,
                                                           node: MemoryNode) -> None:
    await client.encryption.bootstrap()
    state = node.encryption.state
    assert state is not None
    state.writer_registry_for_caller[1] = 0x10000  # type: ignore[index]
    with pytest.raises(WireError, match="65535"):
        await client.encryption.sidecar_state()


async def test_raft(client: Client, node: MemoryNode) -> None:
    status = await client.raft.status()
    assert (status.node_id, status.role, status.leader_id) == ("n1", Role.LEADER, "n1")
    assert await client.raft.add_learner("n2", "127.0.0.1:2", previous_index=1) == 2
    assert await client.raft.promote_learner("n2", skip_min_applied_check=True) == 3
    assert await client.raft.add_voter("n3", "127.0.0.1:3") == 4
    assert [(m.node_id, m.suffrage) for m in await client.raft.members()] == [
        ("n1", "voter"), ("n2", "voter"), ("n3", "voter")]
    await client.raft.transfer_leadership("n2")
    assert (await client.raft.status()).role is Role.FOLLOWER
    assert await client.raft.remove_server("n3") == 5


# --- TLS -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs")
    for authority in ("ours", "theirs"):
        certs.create_ca(directory / authority)
        certs.create_node(directory / authority, "n1")
        certs.create_client(directory / authority, "alice")
    return directory


def files(directory: Path, authority: str, ca: str) -> TlsFiles:
    pair = certs.pair_paths(directory / authority, "alice")
    return TlsFiles(cert=pair.cert, key=pair.key, ca=directory / ca / "ca.crt")


async def test_tls(directory: Path) -> None:
    pair = certs.pair_paths(directory / "ours", "n1")
    node = MemoryNode(tls=TlsFiles(pair.cert, pair.key, directory / "ours" / "ca.crt"))
    async with running(node):
        async with Client([node.address], tls=files(directory, "ours", "ours")) as client:
            await client.put(b"k", b"v")
        for authority, ca in (("theirs", "ours"), ("ours", "theirs")):
            async with Client([node.address], tls=files(directory, authority, ca),
                              timeout_s=0.5) as client:
                with pytest.raises(Unreachable) as caught:
                    await client.put(b"k", b"w")
                assert node.address in str(caught.value)
                assert "certificate" in caught.value.remedy
    assert node.kv.index == 1


async def test_tls_files_that_do_not_fit(directory: Path, tmp_path: Path) -> None:
    good = files(directory, "ours", "ours")
    for bad in (TlsFiles(cert=good.cert, key=good.key, ca=tmp_path / "none"),
                TlsFiles(cert=good.cert, key=certs.pair_paths(directory / "theirs", "n1").key,
                         ca=good.ca)):
        with pytest.raises(ConfigError, match="cannot be used"):
            Client(["127.0.0.1:5"], tls=bad)
