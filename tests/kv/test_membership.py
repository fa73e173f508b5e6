"""elastickv.kv.membership on whole nodes below the servers, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import pytest

from elastickv.clock import HybridLogicalClock, SystemClock
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore, Purpose
from elastickv.crypto.nonce import full_node_id, node_id16
from elastickv.errors import (
    ConditionFailed,
    ElasticKVError,
    EncryptionConflict,
    InvalidArgument,
    MembershipConflict,
    NoLeader,
    NotCapable,
    NotLeader,
    OutcomeUnknown,
    RemovedFromCluster,
)
from elastickv.keys.applier import Applier
from elastickv.keys.registry import decode_row_value, row_key
from elastickv.kv import forwarding
from elastickv.kv.api import WriterRow
from elastickv.kv.encryption import EncryptionController
from elastickv.kv.fsm import KvStateMachine
from elastickv.kv.key_value import KeyValue
from elastickv.kv.membership import METHOD_CHANGE, MembershipController
from elastickv.kv.snapshots import state_snapshots
from elastickv.raft import frames
from elastickv.raft.engine import Member, Suffrage
from elastickv.raft.membership import ChangeKind
from elastickv.raft.pysyncobj_engine import PySyncObjEngine
from elastickv.raft.settings import EngineSettings
from elastickv.store.memory_backend import MemoryBackend
from elastickv.store.mvcc_store import Store
from elastickv.store.values import open_record
from elastickv.wire import Registration, RegistryRow, encode_entry
from tests.kv.key_cluster import DEFAULT
from tests.raft.raft_lab import Hub, HubLinks, MemoryDisk, run

TIMEOUT_S = 10.0
KEK = Kek(bytes(32))


class KeyedNode:
    """One node with keys, a writer registry and membership operations."""

    def __init__(self, hub: Hub, node_id: str, members: Sequence[Member], *,
                 joining: bool = False, kek: Kek | None = KEK, gate: bool = True) -> None:
        self.node_id = node_id
        self.fatal: list[BaseException] = []
        disk = MemoryDisk()
        self.store = Store.open(MemoryBackend(disk, Path("/store")))
        self.applier = Applier(disk=disk, read_row=self.store.row, kek=kek, keystore=Keystore(),
                               sidecar_path=Path("/keys.json"))
        hlc = HybridLogicalClock(SystemClock())
        machine = KvStateMachine(self.store, self.applier, hlc, on_keys_changed=self._changed)
        self.engine = PySyncObjEngine(
            EngineSettings(node_id, members, Path("/raft"), raft_address=address(node_id),
                           joining=joining),
            machine, disk, HubLinks(hub, node_id), generator=random.Random(node_id),
            snapshots=state_snapshots(self.store, self.applier, hlc,
                                      on_keys_changed=self._changed))
        self.engine.on_fatal(self.fatal.append)
        self.encryption = EncryptionController(
            self.engine, self.store, self.applier, full_node_id=full_node_id(node_id), kek=kek,
            gate=gate, build_sha="test", on_fatal=self.fatal.append,
            rotation=DEFAULT)
        self.kv = KeyValue(
            self.engine, self.store, hlc, self.encryption,
            opener=lambda key, record: open_record(self.applier.keystore, key, record),
            writable=self.encryption.refusal, max_value_bytes=1 << 20, max_request_bytes=2 << 20)
        self.membership = MembershipController(
            self.engine, self.store, self.applier, self.encryption.operations,
            raft_address=address(node_id))

    def _changed(self, index: int) -> None:
        self.encryption.keys_changed(index)

    async def start(self) -> None:
        await self.engine.start()
        self.encryption.start()

    def registered(self, node_id: str) -> dict[int, int]:
        """Every DEK to the last epoch that the registry holds for `node_id`, -1 = none."""
        short_id = node_id16(full_node_id(node_id))
        sidecar = self.applier.sidecar
        rows = {dek_id: self.store.row(row_key(dek_id, short_id))
                for dek_id in (sidecar.keys if sidecar else ())}
        return {dek_id: decode_row_value(value).last_seen_epoch if value else -1
                for dek_id, value in rows.items()}

    def suffrages(self) -> dict[str, Suffrage]:
        return {member.node_id: member.suffrage for member in self.engine.members()}


def address(node_id: str) -> str:
    return f"host-{node_id}:1"


class World:
    """A cluster of three, or of `size`, and whoever wants to join it."""

    def __init__(self, size: int = 3) -> None:
        self.hub = Hub()
        self.members = [Member(name, address(name)) for name in ("n1", "n2", "n3")[:size]]
        self.nodes = {member.node_id: KeyedNode(self.hub, member.node_id, self.members)
                      for member in self.members}

    async def start(self, *, bootstrap: bool = True) -> KeyedNode:
        """The leader, with keys and both cutovers unless `bootstrap` is off."""
        for node in self.nodes.values():
            await node.start()
        leader = await self.leader()
        if bootstrap:
            await self.bootstrap(leader)
            for enable in (leader.encryption.enable_storage_envelope,
                           leader.encryption.enable_raft_envelope):
                await enable(proposer_node_id=0, proposer_local_epoch=0, timeout_s=TIMEOUT_S)
        return leader

    async def bootstrap(self, node: KeyedNode) -> None:
        await node.encryption.bootstrap(
            wrapped_storage=b"", wrapped_raft=b"", storage_dek_id=0, raft_dek_id=0, writers=[],
            timeout_s=TIMEOUT_S)

    async def newcomer(self, node_id: str = "n9", **options: Any) -> KeyedNode:
        node = KeyedNode(self.hub, node_id, self.members, joining=True, **options)
        self.nodes[node_id] = node
        await node.start()
        return node

    async def leader(self) -> KeyedNode:
        await self.until(lambda: any(node.engine.is_leader() for node in self.nodes.values()))
        return next(node for node in self.nodes.values() if node.engine.is_leader())

    def follower(self) -> KeyedNode:
        return next(node for node in self.nodes.values() if not node.engine.is_leader())

    async def until(self, condition: Any, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)


def add(node: KeyedNode, node_id: str = "n9", *, previous_index: int = 0,
        timeout_s: float = TIMEOUT_S) -> Awaitable[int]:
    return node.membership.add_learner(node_id, address(node_id), previous_index=previous_index,
                                       timeout_s=timeout_s)


def test_the_newcomer_is_registered_for_every_dek_before_it_is_a_member() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        await leader.encryption.rotate_dek(
            purpose=Purpose.STORAGE, wrapped=b"", new_dek_id=0, proposer_node_id=0,
            proposer_local_epoch=0, timeout_s=TIMEOUT_S)
        newcomer = await world.newcomer()
        registered_when_added: list[dict[int, int]] = []
        change_members = leader.engine.change_members

        async def observed(*arguments: Any, **options: Any) -> int:
            registered_when_added.append(leader.registered("n9"))
            return await change_members(*arguments, **options)

        leader.engine.change_members = observed  # type: ignore[method-assign]
        await add(world.follower())
        assert [set(deks.values()) for deks in registered_when_added] == [{0}]
        assert len(registered_when_added[0]) == 3
        # Epoch 0 makes no nonce: the newcomer confirms higher ones for what is active.
        sidecar = leader.applier.sidecar
        assert sidecar is not None
        await world.until(lambda: newcomer.encryption.writers.epoch(sidecar.active_raft) == 1
                          and newcomer.encryption.writers.epoch(sidecar.active_storage) == 1)

    run(scenario())


def test_a_member_that_comes_back_keeps_its_rows() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        newcomer = await world.newcomer()
        await add(leader)
        await world.until(lambda: sorted(leader.registered("n9").values()) == [1, 1])
        await leader.membership.remove_server("n9", previous_index=0, timeout_s=TIMEOUT_S)
        await world.until(lambda: bool(newcomer.fatal))
        assert isinstance(newcomer.fatal[0], RemovedFromCluster)
        await newcomer.engine.stop()
        again = await world.newcomer()
        await add(leader)
        assert set(leader.registered("n9").values()) >= {1}, "the rows of its former life stay"
        await world.until(lambda: sorted(again.registered("n9").values()) == [2, 2])

    run(scenario())


def test_before_bootstrap_nothing_is_asked() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start(bootstrap=False)
        await add(leader)  # nobody is there
        assert leader.suffrages()["n9"] is Suffrage.LEARNER

    run(scenario())


def test_before_bootstrap_a_voter_must_be_there() -> None:
    """It counts from the moment when its entry is in the log: with a wrong address a cluster of one
    could never commit anything again, not even the removal."""
    async def scenario() -> None:
        world = World(1)
        leader = await world.start(bootstrap=False)
        with pytest.raises(NotCapable, match="does not answer") as caught:
            await leader.membership.add_voter("n9", address("n9"), previous_index=0, timeout_s=2)
        assert "--kekFile" not in caught.value.remedy
        await world.newcomer()
        with pytest.raises(NotCapable, match="is reached by members at"):
            await leader.membership.add_voter("n9", "elsewhere:1", previous_index=0, timeout_s=2)
        await leader.membership.add_voter("n9", address("n9"), previous_index=0,
                                          timeout_s=TIMEOUT_S)
        assert leader.suffrages()["n9"] is Suffrage.VOTER

    run(scenario())


def test_an_answer_that_does_not_parse_is_an_unknown_outcome() -> None:
    """The leader has made the change that it answers."""
    async def scenario() -> None:
        world = World()
        leader = await world.start(bootstrap=False)
        follower = next(node for node in world.nodes.values() if node is not leader)

        async def garbage(peer_id: str, method: str, payload: bytes) -> bytes:
            return b"\xc1"

        leader.engine.handle(METHOD_CHANGE, garbage)
        with pytest.raises(OutcomeUnknown, match="does not parse"):
            await follower.membership.remove_server("n3", previous_index=0, timeout_s=TIMEOUT_S)

    run(scenario())


@pytest.mark.parametrize(("method", "call"), [
    (METHOD_CHANGE, [ChangeKind.REMOVE.value, "n3"]),
    (forwarding.METHOD_ADMIN, ["rotate_dek", {
        "purpose": 1, "wrapped": b"", "new_dek_id": 0, "proposer_node_id": 0,
        "proposer_local_epoch": 0}]),
    (forwarding.METHOD_REGISTER_SELF, forwarding.RegisterSelf(1, full_node_id("n9"), 5)),
    (forwarding.METHOD_WRITE, forwarding.WriteGroup(1000, [])),
], ids=["membership", "keys", "writer", "values"])
def test_who_is_no_member_changes_nothing(method: str, call: object) -> None:
    """Nobody has checked its clients against --admin-names, and no audit log shows them."""
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        stranger = await world.newcomer()
        await world.until(lambda: len(stranger.engine.members()) == 3)
        before = leader.engine.status().last_log_index
        with pytest.raises(NotLeader, match="n9 is no member"):
            await stranger.engine.call(leader.node_id, method, forwarding.encode(call),
                                       timeout_s=TIMEOUT_S)
        assert leader.engine.status().last_log_index == before

    run(scenario())


@pytest.mark.parametrize(("node_id", "raft_address"), [
    ("n 5", "h:1"), ("x\ny", "h:1"), ("", "h:1"), ("localhost", "h:1"), ("n5", "garbage"),
    ("n5", "127.0.0.1:99999"), ("n5", "")])
def test_a_new_member_has_an_id_and_an_address_that_can_be_one(node_id: str,
                                                               raft_address: str) -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start(bootstrap=False)
        before = leader.engine.status().last_log_index
        for operation in (leader.membership.add_voter, leader.membership.add_learner):
            with pytest.raises(InvalidArgument) as caught:
                await operation(node_id, raft_address, previous_index=0, timeout_s=TIMEOUT_S)
            assert caught.value.remedy
        assert leader.engine.status().last_log_index == before

    run(scenario())


@pytest.mark.parametrize(("options", "words"), [
    ({"kek": None, "gate": False}, "n9 runs without a KEK"),
    ({"kek": Kek(b"another KEK, also of 32 bytes   ")}, "KEK of n9 does not open"),
], ids=["without encryption", "with another KEK"])
def test_a_newcomer_that_cannot_decrypt_is_refused(options: dict[str, Any], words: str) -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        await world.newcomer(**options)
        with pytest.raises(NotCapable, match=words) as caught:
            await add(world.follower())
        assert caught.value.remedy
        assert "n9" not in leader.suffrages()
        assert set(leader.registered("n9").values()) == {-1}

    run(scenario())


def test_a_newcomer_that_starts_while_it_is_being_added_is_waited_for() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        adding = asyncio.ensure_future(add(leader))
        await asyncio.sleep(2)
        assert not adding.done()
        await world.newcomer()
        await adding
        assert leader.suffrages()["n9"] is Suffrage.LEARNER

    run(scenario())


def test_a_node_id_that_is_taken_while_the_newcomer_is_asked_is_refused() -> None:
    """It could never be registered, and would stop as soon as it is a member."""
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        adding = asyncio.ensure_future(add(leader))
        await asyncio.sleep(2)
        sidecar = leader.applier.sidecar
        assert sidecar is not None
        await leader.encryption.register_writers(
            dek_id=sidecar.active_storage, timeout_s=TIMEOUT_S,
            writers=[WriterRow(full_node_id("n9") ^ 1 << 40, 0)])
        newcomer = await world.newcomer()
        with pytest.raises(MembershipConflict, match="has the 16-bit node id"):
            await adding
        assert "n9" not in leader.suffrages()
        assert not newcomer.fatal

    run(scenario())


def test_a_newcomer_that_never_answers_is_refused_within_the_deadline() -> None:
    async def scenario() -> None:
        world = World()
        await world.start()
        with pytest.raises(NotCapable, match=r"host-n9:1 does not answer.*--raftJoin, --kekFile"):
            await add(world.follower(), timeout_s=3.0)

    run(scenario())


def test_a_bootstrap_during_an_addition_misses_nobody() -> None:
    """Whichever comes first, the other one sees it: an incapable node never becomes a member of a
    cluster with keys, and a cluster with an incapable member never gets keys."""
    async def scenario(first_bootstrap: bool) -> None:
        world = World()
        leader = await world.start(bootstrap=False)
        await world.newcomer(kek=None, gate=False)
        operations = [world.bootstrap(leader), add(leader)]
        if not first_bootstrap:
            operations.reverse()
        results = await asyncio.gather(*operations, return_exceptions=True)
        assert sum(isinstance(result, NotCapable) for result in results) == 1, results
        assert (leader.applier.sidecar is not None) is not ("n9" in leader.suffrages())

    run(scenario(True))
    run(scenario(False))


def test_a_key_made_between_admission_and_change_is_registered_too() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        await world.newcomer()
        rotated: list[int] = []
        register_self = leader.encryption.operations.register_self

        async def slow(message: Any) -> Any:
            reply = await register_self(message)
            if not rotated:
                rotated.append(0)
                result = await leader.encryption.rotate_dek(
                    purpose=Purpose.RAFT, wrapped=b"", new_dek_id=0, proposer_node_id=0,
                    proposer_local_epoch=0, timeout_s=TIMEOUT_S)
                rotated[0] = result.new_dek_id
            return reply

        leader.encryption.operations.register_self = slow  # type: ignore[method-assign]
        index = await add(leader)
        assert leader.registered("n9")[rotated[0]] >= 0
        assert leader.engine.status().configuration_index == index

    run(scenario())


def test_preconditions() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        await world.newcomer()
        index = await add(leader)
        with pytest.raises(ConditionFailed, match=str(index)):
            await add(world.follower(), "n8", previous_index=index - 1)
        with pytest.raises(MembershipConflict, match="n9 has applied entry"):
            await leader.membership.promote_learner(
                "n9", previous_index=index, min_applied_index=1 << 40,
                skip_min_applied_check=False, timeout_s=TIMEOUT_S)
        with pytest.raises(ConditionFailed):
            await leader.membership.promote_learner(
                "n9", previous_index=index - 1, min_applied_index=0,
                skip_min_applied_check=False, timeout_s=TIMEOUT_S)
        promoted = await world.follower().membership.promote_learner(
            "n9", previous_index=index, min_applied_index=0, skip_min_applied_check=False,
            timeout_s=TIMEOUT_S)
        assert promoted > index
        assert leader.suffrages()["n9"] is Suffrage.VOTER

    run(scenario())


REFUSED_PROMOTIONS: dict[str, tuple[str, int, type[ElasticKVError], str]] = {
    "of nobody": ("n77", 0, InvalidArgument, "'n77' is not a member"),
    "of a voter": ("n2", 0, InvalidArgument, "'n2' is a voter already"),
    "in another configuration": ("n9", 1 << 40, ConditionFailed, "the configuration is that of"),
}


@pytest.mark.parametrize("state", ["up", "lagging", "down"])
@pytest.mark.parametrize("name", REFUSED_PROMOTIONS)
def test_an_impossible_promotion_is_refused_whatever_the_learner_does(name: str,
                                                                      state: str) -> None:
    node_id, previous_index, refusal, words = REFUSED_PROMOTIONS[name]

    async def scenario() -> None:
        world = World()
        leader = await world.start(bootstrap=False)
        await world.newcomer()
        await add(leader)
        if state == "down":
            for silent in {"n2", "n9"} - {leader.node_id}:
                world.hub.isolate(silent)
        elif state == "lagging":
            world.hub.rule = lambda source, target, message: int(not (
                target == "n9" and isinstance(message, frames.AppendEntries)))
        await leader.kv.put(b"k", b"v", timeout_s=TIMEOUT_S)
        with pytest.raises(refusal, match=words):
            await leader.membership.promote_learner(
                node_id, previous_index=previous_index, min_applied_index=0,
                skip_min_applied_check=False, timeout_s=TIMEOUT_S)
        assert leader.suffrages()["n9"] is Suffrage.LEARNER

    run(scenario())


def test_a_learner_that_was_added_at_another_address_is_not_promoted() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start(bootstrap=False)
        await world.newcomer()
        await leader.membership.add_learner("n9", "[10.0.0.9]:01", previous_index=0,
                                            timeout_s=TIMEOUT_S)
        with pytest.raises(MembershipConflict, match=r"added at 10\.0\.0\.9:1, .* is host-n9:1"):
            await leader.membership.promote_learner(
                "n9", previous_index=0, min_applied_index=0, skip_min_applied_check=False,
                timeout_s=TIMEOUT_S)
        assert leader.suffrages()["n9"] is Suffrage.LEARNER

    run(scenario())


def test_a_learner_that_is_down_is_promoted_only_without_the_check() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        await world.newcomer()
        await add(leader)
        world.hub.isolate("n9")
        with pytest.raises(MembershipConflict, match="n9 does not say what it has applied"):
            await leader.membership.promote_learner(
                "n9", previous_index=0, min_applied_index=0, skip_min_applied_check=False,
                timeout_s=TIMEOUT_S)
        await leader.membership.promote_learner(
            "n9", previous_index=0, min_applied_index=0, skip_min_applied_check=True,
            timeout_s=TIMEOUT_S)
        assert leader.suffrages()["n9"] is Suffrage.VOTER

    run(scenario())


def test_one_change_at_a_time() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        first = asyncio.ensure_future(add(leader))  # waits for n9
        await asyncio.sleep(0.5)
        with pytest.raises(MembershipConflict, match="under way: add-learner n9"):
            await world.follower().membership.remove_server("n3", previous_index=0,
                                                            timeout_s=TIMEOUT_S)
        await world.newcomer()
        await first

    run(scenario())


@pytest.mark.parametrize("through", ["the leader itself", "a follower"])
def test_a_leader_that_is_removed_hands_over_first(through: str) -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        asked = leader if through == "the leader itself" else world.follower()
        index = await asked.membership.remove_server(leader.node_id, previous_index=0,
                                                     timeout_s=TIMEOUT_S)
        await world.until(lambda: bool(leader.fatal))
        assert isinstance(leader.fatal[0], RemovedFromCluster)
        del world.nodes[leader.node_id]
        new = await world.leader()
        assert set(new.suffrages()) == set(world.nodes)
        assert new.engine.status().configuration_index == index

    run(scenario())


def test_a_follower_can_be_asked_to_leave() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        leaving = world.follower()
        index = await leaving.membership.remove_server(leaving.node_id, previous_index=0,
                                                       timeout_s=TIMEOUT_S)
        await world.until(lambda: leader.engine.status().configuration_index == index)
        assert leaving.node_id not in leader.suffrages()

    run(scenario())


def test_the_only_voter_cannot_be_removed_and_keeps_leading() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        for name in [name for name in world.nodes if name != leader.node_id]:
            await leader.membership.remove_server(name, previous_index=0, timeout_s=TIMEOUT_S)
        with pytest.raises(MembershipConflict, match="the only voter"):
            await leader.membership.remove_server(leader.node_id, previous_index=0,
                                                  timeout_s=TIMEOUT_S)
        assert leader.engine.is_leader()

    run(scenario())


def test_a_leader_whose_removal_is_refused_goes_on_leading() -> None:
    """Without it, the two others would need the one that is down."""
    async def scenario() -> None:
        world = World()
        leader = await world.start(bootstrap=False)
        term = leader.engine.status().term
        down = world.follower()
        world.hub.isolate(down.node_id)
        with pytest.raises(MembershipConflict, match=f"an answer from {down.node_id}"):
            await leader.membership.remove_server(leader.node_id, previous_index=0,
                                                  timeout_s=TIMEOUT_S)
        assert leader.engine.is_leader()
        assert leader.engine.status().term == term

    run(scenario())


def test_transfer_from_any_member_by_id_or_address() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        target = world.follower()
        asked = next(node for node in world.nodes.values() if node not in (leader, target))
        await asked.membership.transfer_leadership("", address(target.node_id),
                                                   timeout_s=TIMEOUT_S)
        assert asked.engine.status().leader_id == target.node_id
        with pytest.raises(InvalidArgument, match="n7 is no member"):
            await asked.membership.transfer_leadership("n7", timeout_s=TIMEOUT_S)
        await asked.membership.transfer_leadership("", timeout_s=TIMEOUT_S)
        assert asked.engine.status().leader_id not in ("", target.node_id)

    run(scenario())


def test_without_a_leader_nothing_is_proposed() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        for name in world.nodes:
            world.hub.isolate(name)
        await world.until(lambda: not leader.engine.is_leader())
        with pytest.raises(NoLeader, match="nothing was proposed"):
            await leader.membership.remove_server("n3", previous_index=0, timeout_s=0.5)

    run(scenario())


def test_a_lost_answer_is_of_unknown_outcome_and_never_repeated() -> None:
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        follower = world.follower()
        removed = next(name for name in world.nodes
                       if name not in (leader.node_id, follower.node_id))
        world.hub.rule = lambda source, target, message: int(not (
            isinstance(message, frames.Response) and source == leader.node_id))
        before = leader.engine.status().configuration_index
        with pytest.raises(Exception, match="did not answer in time") as caught:
            await follower.membership.remove_server(removed, previous_index=0, timeout_s=1.0)
        assert type(caught.value).__name__ == "OutcomeUnknown"
        assert leader.engine.status().configuration_index > before
        assert removed not in leader.suffrages()

    run(scenario())


def test_a_registration_that_a_stopping_leader_asked_of_itself_is_decided_under_the_lock() -> None:
    """What is validated without it could not be applied behind it, on no member."""
    async def scenario() -> None:
        world = World()
        leader = await world.start()
        follower = world.follower()
        own = encode_entry(Registration(RegistryRow(77, full_node_id(leader.node_id), 1)))
        world.hub.rule = lambda source, target, message: own not in frames.encode_message(message)
        await leader.encryption.rotate_dek(
            purpose=Purpose.STORAGE, wrapped=KEK.generate_wrapped_dek(), new_dek_id=77,
            proposer_node_id=full_node_id(follower.node_id), proposer_local_epoch=0,
            timeout_s=TIMEOUT_S)
        await world.until(lambda: leader.encryption.operations.lock.locked())
        leader.encryption.stop()
        registering = asyncio.ensure_future(follower.encryption.register_writers(
            dek_id=77, writers=[WriterRow(full_node_id(leader.node_id), 0)], timeout_s=TIMEOUT_S))
        await asyncio.sleep(0.2)
        world.hub.rule = lambda source, target, message: 1
        with pytest.raises(EncryptionConflict, match="announced epoch 0"):
            await registering
        assert not any(node.fatal for node in world.nodes.values())

    run(scenario())
