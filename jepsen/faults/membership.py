"""Changes of the membership and of the leader, by the operator."""

from __future__ import annotations

import asyncio

from elastickv.client import Client
from elastickv.errors import ElasticKVError, ExitCode, PeerError, Unimplemented
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
        node = await self.some_node(prefer_leader=0.3)
        operator = cluster.new_client(cluster.others([node])[0], timeout_s=10.0)
        process = cluster.processes[node]
        process.expected_codes = frozenset({ExitCode.REMOVED})
        try:
            await self._remove(operator, node)
        except Unimplemented as error:
            raise NotAvailable(str(error)) from None
        finally:
            await operator.close()
        self._removed = node
        code = await process.wait(REMOVED_TIMEOUT_S)
        if code is None:
            raise Violation(f"{node} was removed and did not stop within {REMOVED_TIMEOUT_S:g} s")
        if code != ExitCode.REMOVED:
            raise Violation(f"{node} was removed and stopped with exit code {code}")
        return f"{node} removed"

    async def _remove(self, operator: Client, node: str) -> None:
        """Until `node` is no member. Raises the last answer when time runs out."""
        now = asyncio.get_running_loop().time
        deadline = now() + CHANGED_TIMEOUT_S
        while True:
            try:
                await operator.raft.remove_server(node)
                return
            except PeerError:
                # The outcome may be unknown; left alone, the node could be gone at any time.
                if not await self._is_member(operator, node):
                    return
                if now() > deadline:
                    raise
            await asyncio.sleep(POLL_S)

    async def _is_member(self, operator: Client, node: str) -> bool:
        return node in {member.node_id for member in await operator.raft.members()}

    async def _add(self, operator: Client, node: str) -> None:
        """Until `node` is a member. Raises the last answer when time runs out."""
        now = asyncio.get_running_loop().time
        deadline = now() + CHANGED_TIMEOUT_S
        while True:
            try:
                await operator.raft.add_voter(node, self.cluster.network.raft_address(node))
                return
            except ElasticKVError:
                # Its outcome may be unknown, and a node that only just started is refused.
                if await self._is_member(operator, node):
                    return
                if now() > deadline:
                    raise
            await asyncio.sleep(POLL_S)

    async def heal(self) -> None:
        node, self._removed = self._removed, ""
        if node:
            cluster = self.cluster
            await asyncio.to_thread(cluster.take_disk_away, node)
            cluster.processes[node].command = cluster.joining_command(node)
            await cluster.restart(node)
            operator = cluster.new_client(cluster.others([node])[0], timeout_s=20.0)
            try:
                await self._add(operator, node)
            finally:
                await operator.close()
        await self.restart_all()


class Transfer(Fault):
    """Leadership is handed over while clients write."""

    name = "transfer"
    is_brief = True

    async def inject(self) -> str:
        before = await self.cluster.leader()
        if before is None:
            raise NotNow("nobody leads")
        target = self.random.choice(self.cluster.others([before]))
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
