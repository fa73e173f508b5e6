"""Encryption operations while everything else goes wrong. To the cluster they are disturbances like
any other: they must neither lose nor delay what clients do, nor leave members that differ."""

from __future__ import annotations

import asyncio
import random

from elastickv.client import Client, Purpose
from elastickv.errors import ElasticKVError, EncryptionConflict, ExitCode, Unimplemented
from elastickv.keys.sidecar import RELATIVE_PATH
from jepsen.cluster import POLL_S, Cluster
from jepsen.faults.api import Fault, NotAvailable, NotNow, Requirements, Violation

REFUSAL_TIMEOUT_S = 30.0
"""A node whose KEK is wrong has to refuse within this time."""

REPAIR_TIMEOUT_S = 40.0


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
            await self._require_keys()
            return "refused a second time"
        return f"DEKs {done.storage_dek_id} and {done.raft_dek_id} at {done.applied_index}"

    async def _require_keys(self) -> None:
        """Until somebody has keys; who was wiped just now has none, although all is well."""
        now = asyncio.get_running_loop().time
        deadline = now() + REPAIR_TIMEOUT_S
        while True:
            answers = await asyncio.gather(*map(self._has_keys, self.cluster.nodes))
            if any(answers):
                return
            if now() > deadline:
                if None in answers:
                    raise NotNow("refused as a second one; not every node says what keys it has")
                raise Violation("a bootstrap was refused as a second one, and there was no first")
            await asyncio.sleep(POLL_S)

    async def _has_keys(self, node: str) -> bool | None:
        """None when it does not answer."""
        try:
            sidecar = await self.cluster.admin(node).encryption.sidecar_state(timeout_s=1.0)
        except ElasticKVError:
            return None
        return bool(sidecar.active_storage_id)


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


class Resync(Fault):
    """One node loses its sidecar, or finds it damaged. It takes the key state over from the leader,
    by itself at its start or by the operator's command."""

    name = "resync"
    must_settle = True

    def __init__(self, cluster: Cluster, source: random.Random) -> None:
        super().__init__(cluster, source)
        self._node = ""
        self._by_command = False

    async def inject(self) -> str:
        cluster = self.cluster
        self.returned = node = await self.some_node()
        # Drawn each time: a moment without keys must not change what comes later.
        is_lost, kept_part = self.random.random() < 0.5, self.random.random()
        self._by_command = self.random.random() < 0.5
        if not (await cluster.admin(node).encryption.sidecar_state()).active_storage_id:
            raise NotNow("the cluster has no keys yet")
        await cluster.processes[node].kill()
        sidecar = cluster.data_directory(node) / RELATIVE_PATH
        if is_lost:
            sidecar.unlink()
            how = "lost"
        else:
            data = sidecar.read_bytes()
            sidecar.write_bytes(data[:int(kept_part * len(data))])
            how = "damaged"
        self._node = node
        return f"sidecar of {node} {how}"

    async def effect(self) -> str:
        """Mends it here, because the run shows nothing until the node has its keys again."""
        node, cluster = self._node, self.cluster
        process = cluster.processes[node]
        if self._by_command:
            await self._resync_by_command(node)
        process.expected_codes = (frozenset() if self._by_command
                                  else frozenset({ExitCode.STARTUP_REFUSED}))
        await cluster.restart(node)
        if self._by_command:
            return "restored by resync-sidecar"
        now = asyncio.get_running_loop().time
        deadline = now() + REPAIR_TIMEOUT_S
        while node not in await cluster.statuses():
            if not process.is_running:
                await self._resync_by_command(node)
                return (f"it stopped with {process.exits[-1].code}, "
                        "restored by resync-sidecar")
            if now() > deadline:
                raise Violation(f"{node} neither repaired its sidecar nor stopped within "
                                f"{REPAIR_TIMEOUT_S:g} s")
            await asyncio.sleep(POLL_S)
        return "restored by the node itself"

    async def _resync_by_command(self, node: str) -> None:
        """What an operator runs on the machine of the stopped node. Raises `Violation` when it does
        not succeed."""
        code, output = await self.cluster.command_of_operator(
            node, "admin", "encryption", "resync-sidecar", "--raftId", node,
            "--raftDataDir", str(self.cluster.data_directory(node)),
            "--kekFile", str(self.cluster.kek_file))
        if code:
            raise Violation(f"resync-sidecar of {node} ended with {code}: {output}")

    async def heal(self) -> None:
        await self.restart_all()


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
        process.expected_codes = frozenset({ExitCode.STARTUP_REFUSED})
        await process.start()
        code = await process.wait(REFUSAL_TIMEOUT_S)
        if code is None or code == 0:
            raise Violation(f"{node} runs with a KEK that is not the cluster's (exit code {code})")
        if code != ExitCode.STARTUP_REFUSED:
            raise NotNow(f"{node} ended with exit code {code}, not because of its KEK")
        return f"{node} refused with exit code {code}"

    async def heal(self) -> None:
        for node, process in self.cluster.processes.items():
            if process.expected_codes:
                await process.kill()
                process.command = self.cluster.command(node)
        await self.restart_all()
