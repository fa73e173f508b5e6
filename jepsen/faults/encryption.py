"""Encryption operations while everything else goes wrong. To the cluster they are disturbances like
any other: they must neither lose nor delay what clients do, nor leave members that differ."""

from __future__ import annotations

from elastickv.client import Client, Purpose
from elastickv.crypto.nonce import full_node_id
from elastickv.errors import EncryptionConflict, Unimplemented
from jepsen.faults.api import Fault, NotAvailable, NotNow, Requirements, Violation

REFUSAL_TIMEOUT_S = 5.0
"""A node whose KEK is wrong has to refuse within this time."""


class _Operation(Fault):
    """One call of an operator, to a random node."""

    is_brief = True

    async def operate(self, operator: Client) -> str:
        raise NotImplementedError

    async def inject(self) -> str:
        operator = self.cluster.new_client(self.random.choice(self.cluster.nodes), timeout_s=10.0)
        try:
            return await self.operate(operator)
        except Unimplemented as error:
            raise NotAvailable(str(error)) from None
        finally:
            await operator.close()


class Bootstrap(_Operation):
    """The first bootstrap under load; later ones have to be refused."""

    name = "bootstrap"
    requirements = Requirements(starts_in_clear=True)

    async def operate(self, operator: Client) -> str:
        try:
            done = await operator.encryption.bootstrap()
        except EncryptionConflict:
            if not (await operator.encryption.sidecar_state()).active_storage_id:
                raise Violation("a bootstrap was refused as a second one, and there was no first"
                                ) from None
            return "refused a second time"
        return f"DEKs {done.storage_dek_id} and {done.raft_dek_id} at {done.applied_index}"


class Cutovers(_Operation):
    """Bootstrap if need be, then both cutovers under load; later ones have to change nothing."""

    name = "cutovers"
    requirements = Requirements(starts_in_clear=True)

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._indexes: tuple[int, int] | None = None

    async def operate(self, operator: Client) -> str:
        if not (await operator.encryption.sidecar_state()).active_storage_id:
            await operator.encryption.bootstrap()
        storage = await operator.encryption.enable_storage_envelope()
        raft = await operator.encryption.enable_raft_envelope()
        indexes = (storage.applied_index, raft.applied_index)
        self.cluster.sealed = True
        if self._indexes not in (None, indexes):
            raise Violation(f"the cutovers moved from {self._indexes} to {indexes}")
        again, self._indexes = self._indexes is not None, indexes
        return f"{'still' if again else 'now'} at {indexes[0]} and {indexes[1]}"


class _Rotate(_Operation):
    purpose = Purpose.STORAGE

    async def operate(self, operator: Client) -> str:
        rotated = await operator.encryption.rotate_dek(self.purpose)
        return f"DEK {rotated.new_dek_id} at {rotated.applied_index}"


class RotateStorage(_Rotate):
    """A new DEK for values."""

    name = "rotate-storage"


class RotateRaft(_Rotate):
    """A new DEK for the log."""

    name = "rotate-raft"
    purpose = Purpose.RAFT


class Resync(_Operation):
    """A member asks for the leader's key state."""

    name = "resync"

    async def operate(self, operator: Client) -> str:
        node = self.random.choice(self.cluster.nodes)
        state = await operator.encryption.resync_sidecar(full_node_id(node))
        if self.cluster.sealed and not state.wrapped_deks_by_id:
            raise Violation(f"the leader has no keys for {node}")
        return f"{node}: {len(state.wrapped_deks_by_id)} DEKs"


class WrongKek(Fault):
    """One node restarts with another KEK. It has to refuse, and the others have to go on."""

    name = "wrong-kek"

    async def inject(self) -> str:
        cluster = self.cluster
        node = await self.some_node()
        process = cluster.processes[node]
        if not (await cluster.admin(node).encryption.sidecar_state()).active_storage_id:
            raise NotNow("the cluster has no keys yet")
        await process.kill()
        process.command = cluster.command(node, kek_file=cluster.wrong_kek_file)
        process.expect_exit = True
        await process.start()
        code = await process.wait(REFUSAL_TIMEOUT_S)
        if code is None or code == 0:
            raise Violation(f"{node} runs with a KEK that is not the cluster's (exit code {code})")
        return f"{node} refused with exit code {code}"

    async def heal(self) -> None:
        for node, process in self.cluster.processes.items():
            if process.expect_exit:
                await process.kill()
                process.command = self.cluster.command(node)
        await self.restart_all()
