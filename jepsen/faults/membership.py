"""Changes of the membership and of the leader, by the operator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from elastickv.client import Role
from elastickv.errors import ElasticKVError, ExitCode, NoLeader, Unimplemented
from jepsen.cluster import POLL_S
from jepsen.faults.api import Fault, NotAvailable, NotNow, Violation

REMOVED_TIMEOUT_S = 30.0
CHANGED_TIMEOUT_S = 60.0
MOVED_TIMEOUT_S = 5.0


class Membership(Fault):
    """One member is removed, stops, and is added again with an empty disk."""

    name = "membership"
    must_settle = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._removed = ""

    async def inject(self) -> str:
        cluster = self.cluster
        self.returned = node = await self.some_node(prefer_leader=0.3)
        operator = cluster.new_client(cluster.others([node])[0], timeout_s=10.0)
        process = cluster.processes[node]
        process.expected_codes = frozenset({ExitCode.REMOVED})
        # Before it is asked for: whatever the answer, the node may be gone.
        self._removed = node
        try:
            await self._change(node, lambda: operator.raft.remove_server(node), is_wanted=False)
        except Unimplemented as error:
            raise NotAvailable(str(error)) from None
        finally:
            await operator.close()
        code = await process.wait(REMOVED_TIMEOUT_S)
        if code is None:
            raise Violation(f"{node} was removed and did not stop within {REMOVED_TIMEOUT_S:g} s")
        if code != ExitCode.REMOVED:
            raise Violation(f"{node} was removed and stopped with exit code {code}")
        return f"{node} removed"

    async def _change(self, node: str, call: Callable[[], Awaitable[int]], *,
                      is_wanted: bool) -> None:
        """Until `node` is a member as `is_wanted` says. Raises the last answer when time runs out,
        and `Unimplemented` at once."""
        now = asyncio.get_running_loop().time
        deadline = now() + CHANGED_TIMEOUT_S
        while True:
            try:
                await call()
                return
            except Unimplemented:
                raise
            except ElasticKVError:
                # Its outcome may be unknown, or an earlier one took effect after all; and a node
                # that only just started is refused.
                if await self._is_member(node) is is_wanted:
                    return
                if now() > deadline:
                    raise
            await asyncio.sleep(POLL_S)

    async def _is_member(self, node: str) -> bool | None:
        """What the leader says; None when there is none, or what it says may still change."""
        leader = await self.cluster.leader()
        if leader is None:
            return None
        raft = self.cluster.admin(leader).raft
        try:
            members = {member.node_id for member in await raft.members()}
            status = await raft.status()
        except ElasticKVError:
            return None
        if status.role is not Role.LEADER or status.pending_configuration:
            return None
        return node in members

    async def _is_removed(self, node: str) -> bool:
        """Once a leader says. Raises `NoLeader` when time runs out."""
        now = asyncio.get_running_loop().time
        deadline = now() + CHANGED_TIMEOUT_S
        while (is_member := await self._is_member(node)) is None:
            if now() > deadline:
                raise NoLeader(f"no leader says whether {node} is a member")
            await asyncio.sleep(POLL_S)
        return not is_member

    async def heal(self) -> None:
        node, self._removed = self._removed, ""
        if node and await self._is_removed(node):
            cluster, process = self.cluster, self.cluster.processes[node]
            await process.kill()
            await asyncio.to_thread(cluster.take_disk_away, node)
            process.command = cluster.joining_command(node)
            await cluster.restart(node)
            operator = cluster.new_client(cluster.others([node])[0], timeout_s=20.0)
            try:
                await self._change(node, lambda: operator.raft.add_voter(
                    node, cluster.network.raft_address(node)), is_wanted=True)
            finally:
                await operator.close()
        await self.restart_all()


class Transfer(Fault):
    """Leadership is handed over while clients write."""

    name = "transfer"
    is_brief = True

    async def inject(self) -> str:
        # Drawn each time: a moment without a leader must not change what comes later.
        order = self.random.sample(self.cluster.nodes, len(self.cluster.nodes))
        before = await self.cluster.leader()
        if before is None:
            raise NotNow("nobody leads")
        target = next(node for node in order if node != before)
        operator = self.cluster.new_client(target, timeout_s=5.0)
        try:
            await operator.raft.transfer_leadership(target)
        except Unimplemented as error:
            raise NotAvailable(str(error)) from None
        finally:
            await operator.close()
        now = asyncio.get_running_loop().time
        deadline = now() + MOVED_TIMEOUT_S
        while (after := await self.cluster.leader()) in (None, before):
            if now() > deadline:
                raise NotNow(f"{before} was asked to hand over to {target} and leads on")
            await asyncio.sleep(POLL_S)
        return f"from {before} to {target}, now {after}"
