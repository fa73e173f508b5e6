"""Changes of the membership and of the leader, by the operator."""

from __future__ import annotations

import asyncio

from elastickv.errors import Unimplemented
from jepsen.faults.api import Fault, NotAvailable, Violation

REMOVED_TIMEOUT_S = 10.0


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
        try:
            process.expect_exit = True
            await operator.raft.remove_server(node)
        except Unimplemented as error:
            process.expect_exit = False
            raise NotAvailable(str(error)) from None
        finally:
            await operator.close()
        self._removed = node
        if await process.wait(REMOVED_TIMEOUT_S) is None:
            raise Violation(f"{node} was removed and did not stop within {REMOVED_TIMEOUT_S:g} s")
        return f"{node} removed"

    async def heal(self) -> None:
        node, self._removed = self._removed, ""
        if node:
            cluster = self.cluster
            await asyncio.to_thread(cluster.take_disk_away, node)
            cluster.processes[node].command = cluster.joining_command(node)
            await cluster.restart(node)
            operator = cluster.new_client(cluster.others([node])[0], timeout_s=20.0)
            try:
                await operator.raft.add_voter(node, cluster.network.raft_address(node))
            finally:
                await operator.close()
        await self.restart_all()


class Transfer(Fault):
    """Leadership is handed over while clients write."""

    name = "transfer"
    is_brief = True

    async def inject(self) -> str:
        target = self.random.choice(self.cluster.nodes)
        operator = self.cluster.new_client(target, timeout_s=5.0)
        try:
            await operator.raft.transfer_leadership(target)
        except Unimplemented as error:
            raise NotAvailable(str(error)) from None
        finally:
            await operator.close()
        return f"to {target}"
