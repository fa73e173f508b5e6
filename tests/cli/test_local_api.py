"""elastickv.cli.local_api: how a local cluster is brought up, on a node in this process."""

from __future__ import annotations

from pathlib import Path

from memory_node import MemoryNode, in_thread

from elastickv.cli.local_api import ClusterApi
from elastickv.cli.local_cluster import bring_up
from elastickv.cli.local_processes import CLIENT_NAME, Shape, prepare
from elastickv.kv.api import SidecarState
from jepsen.network.ports import free_ports


def test_a_bootstrap_that_the_member_has_not_applied_yet_is_done(tmp_path: Path) -> None:
    """Of an attempt whose answer was lost, or of a run that was stopped before it went on."""
    layout, _ = prepare(tmp_path, Shape(1, *free_ports(2)))
    node = MemoryNode("n1", port=layout.shape.client_port, tls=layout.tls("n1"))
    up_to_date = node.encryption.sidecar_state

    async def behind() -> SidecarState:
        node.encryption.sidecar_state = up_to_date  # type: ignore[method-assign]
        before = await up_to_date()
        await node.encryption.bootstrap(
            wrapped_storage=b"", wrapped_raft=b"", storage_dek_id=0, raft_dek_id=0, writers=[],
            timeout_s=1)
        return before

    node.encryption.sidecar_state = behind  # type: ignore[method-assign]
    with in_thread(node), ClusterApi(layout.members, layout.tls(CLIENT_NAME)) as api:
        (view,) = bring_up(api, layout, [])
    assert node.encryption.proposals == ["bootstrap", "enable storage", "enable raft"]
    assert (view.storage_dek_id, view.raft_dek_id) == (1, 2)
