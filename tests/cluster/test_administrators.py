"""--admin-names on a cluster: what a follower forwards is carried out, whoever leads."""

from __future__ import annotations

import pytest

from elastickv import certs
from elastickv.client import Client, Purpose
from elastickv.config import TlsFiles
from elastickv.errors import NotAuthorized
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster]


class TlsCluster(Cluster):
    """With certificates, and `alice` for its administrator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.certs = self.directory / "certs"
        certs.create_ca(self.certs)
        for name in ("alice", "bob"):
            certs.create_client(self.certs, name)
        for name, node in self.nodes.items():
            certs.create_node(self.certs, name)
            node.arguments.remove("--insecure")
            files = self.files_of(name)
            node.arguments += ["--tls-cert", str(files.cert), "--tls-key", str(files.key),
                               "--tls-ca", str(files.ca), "--admin-names", "alice"]

    def files_of(self, name: str) -> TlsFiles:
        pair = certs.pair_paths(self.certs, name)
        return TlsFiles(pair.cert, pair.key, self.certs / "ca.crt")

    def client(self, *names: str, timeout_s: float = 10.0, who: str = "alice") -> Client:
        return Client([self.nodes[name].address for name in names or self.nodes],
                      tls=self.files_of(who), timeout_s=timeout_s)


@pytest.fixture
def cluster_type() -> type[TlsCluster]:
    return TlsCluster


async def test_administrators_reach_the_leader_through_any_member(cluster: TlsCluster) -> None:
    for name in cluster.nodes:
        async with cluster.client(name) as client:
            await client.encryption.rotate_dek(Purpose.STORAGE)
        async with cluster.client(name, who="bob") as client:
            await client.put(b"k", b"v")
            assert len(await client.encryption.members()) == len(cluster.nodes)
            await client.raft.status()
            with pytest.raises(NotAuthorized):
                await client.encryption.rotate_dek(Purpose.STORAGE)
            with pytest.raises(NotAuthorized):
                await client.raft.transfer_leadership("n1")
            assert (await client.get(b"k")).value == b"v"
    async with cluster.client() as client:
        keys = await client.encryption.sidecar_state()
    # Two of the bootstrap, and one rotation through each member.
    assert len(keys.wrapped_deks_by_id) == 2 + len(cluster.nodes)
