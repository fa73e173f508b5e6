"""No key leaves a node: not in argv, environment, logs or files, not in repr, traceback or pickle.

A real node at debug level lives through bootstrap, cutovers, rotations and errors. Then the KEK and
every DEK that it ever had are searched for, raw, in hex and in base64.
"""

from __future__ import annotations

import base64
import pickle
import signal
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio

from elastickv.client import Purpose
from elastickv.crypto.kek import Kek
from elastickv.crypto.kek_file import FileKekProvider, write_kek_file
from elastickv.crypto.keystore import KeyHandle, Keystore
from elastickv.crypto.keystore import Purpose as KeyPurpose
from elastickv.durable import OsDisk
from elastickv.errors import ElasticKVError, KekError
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.applier import Applier
from elastickv.keys.sidecar import RELATIVE_PATH
from tests.cluster.cluster import Cluster, NodeProcess

pytestmark = [pytest.mark.cluster]

NODE = "n1"
DEKS = 4
"""Two of the bootstrap, and one rotation of each purpose."""


def spellings(key: bytes) -> set[bytes]:
    """A key as it could be written: raw, hex, `repr`, and base64 at each alignment in a longer
    text, of which only the whole characters that the key alone decides are compared."""
    aligned = {base64.b64encode(bytes(offset) + key)[4 * bool(offset):40]
               for offset in range(3)}
    url_safe = {text.replace(b"+", b"-").replace(b"/", b"_") for text in aligned}
    written = repr(key)[2:-1].encode()
    return {key, key.hex().encode(), key.hex().upper().encode(), written, *aligned, *url_safe}


def found(content: bytes, keys: dict[str, bytes]) -> list[str]:
    """Names of the keys that occur in `content`."""
    return [name for name, key in keys.items()
            if any(spelling in content for spelling in spellings(key))]


@pytest.mark.parametrize("spell", [
    bytes, lambda key: key.hex().encode(), lambda key: key.hex().upper().encode(),
    base64.b64encode, base64.urlsafe_b64encode, lambda key: repr({"k": key}).encode(),
    lambda key: base64.b64encode(b"x" + key + b"yz"),
    lambda key: base64.b64encode(b"xx" + key + b"y"),
], ids=["raw", "hex", "HEX", "base64", "urlsafe", "repr", "base64 + 1", "base64 + 2"])
def test_the_search_finds_a_key_in_every_spelling(spell: Callable[[bytes], bytes]) -> None:
    for first in range(0, 256, 8):
        key = bytes((first + 37 * place) % 256 for place in range(32))
        assert found(b"before " + spell(key) + b" after", {"key": key}) == ["key"]
        assert found(b"before " + spell(bytes(32)) + b" after", {"key": key}) == []


@dataclass
class Lived:
    """A stopped node that has seen everything, and what was visible of it while it ran."""

    node: NodeProcess
    kek: Path
    arguments: bytes
    environment: bytes
    keys: dict[str, bytes] = field(repr=False)


def keys_of(node: NodeProcess, kek_path: Path) -> dict[str, bytes]:
    """The KEK and every DEK of a node, in the clear."""
    sidecar = sidecar_file.load(OsDisk(), node.directory / RELATIVE_PATH)
    assert sidecar is not None
    kek = FileKekProvider(kek_path).load()
    deks = {f"DEK {dek_id}": kek.unwrap(key.wrapped) for dek_id, key in sidecar.keys.items()}
    return {"KEK": kek_path.read_bytes(), **deks}


async def live(cluster: Cluster) -> None:
    """Every operation on keys, and requests that fail in each of them."""
    await cluster.encrypt()
    async with cluster.client() as client:
        await client.put(b"k", b"v")
        await client.encryption.rotate_dek(Purpose.STORAGE)
        await client.encryption.rotate_dek(Purpose.RAFT)
        await client.put(b"k", b"v2")
        sidecar = await client.encryption.sidecar_state()
        wrapped = next(iter(sidecar.wrapped_deks_by_id.values()))
        damaged = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
        wrong = [
            lambda: client.encryption.bootstrap(),
            lambda: client.encryption.rotate_dek(Purpose.STORAGE, wrapped=damaged, new_dek_id=77,
                                                 proposer_node_id=1),
            lambda: client.encryption.rotate_dek(
                Purpose.STORAGE, wrapped=wrapped, new_dek_id=sidecar.active_raft_id,
                proposer_node_id=1),
            lambda: client.encryption.register_writers(99, []),
            lambda: client.encryption.resync_sidecar(0),
            lambda: client.raft.remove_server(NODE),
        ]
        for call in wrong:
            with pytest.raises(ElasticKVError):
                await call()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lived(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lived]:
    cluster = Cluster(tmp_path_factory.mktemp("hygiene") / "cluster", size=1,
                      extra=["--log-level", "debug"])
    node, kek = cluster.nodes[NODE], cluster.directory / "kek"
    try:
        await cluster.start()
        await live(cluster)
        assert node.process is not None
        process = Path("/proc", str(node.process.pid))
        arguments = (process / "cmdline").read_bytes()
        try:
            environment = (process / "environ").read_bytes()
        except PermissionError:  # not dumpable: only root may look
            environment = b""
        assert node.kill(signal.SIGTERM) == 0
        await cluster.start()  # once more: keys are loaded rather than made
        assert node.kill(signal.SIGTERM) == 0
        # A KEK that unwraps nothing: the node that refuses says so in the same log.
        secret = kek.read_bytes()
        kek.unlink()
        write_kek_file(kek)
        node.start()
        assert await cluster.exit_code(NODE) == 3
        kek.write_bytes(secret)
        yield Lived(node, kek, arguments, environment, keys_of(node, kek))
    finally:
        cluster.stop()


def test_argv_and_environment_hold_no_key(lived: Lived) -> None:
    assert b"--kekFile" in lived.arguments
    assert len(lived.keys) == 1 + DEKS
    assert found(lived.arguments, lived.keys) == []
    assert found(lived.environment, lived.keys) == []


def test_no_file_of_the_node_holds_a_key(lived: Lived) -> None:
    """Its directory and its log: everything but the KEK file."""
    files = [path for path in lived.kek.parent.rglob("*") if path.is_file() and path != lived.kek]
    names = {path.name for path in files}
    assert {"keys.json", "audit.log", f"{NODE}.log"} <= names
    assert {path: keys for path in files if (keys := found(path.read_bytes(), lived.keys))} == {}
    assert found(lived.kek.read_bytes(), lived.keys) == ["KEK"]


def test_the_node_logged_at_debug_level_what_it_did_for_its_keys(lived: Lived) -> None:
    """Without this the search in the log could pass because nothing was logged."""
    for text in ("core dumps off", "memory locked", "kek-unwraps"):
        assert text in lived.node.log


def test_the_audit_log_names_each_call_and_its_result(lived: Lived) -> None:
    text = (lived.node.directory / "audit.log").read_text()
    for method in ("BootstrapEncryption", "EnableStorageEnvelope", "EnableRaftEnvelope",
                   "RotateDEK", "RegisterEncryptionWriter", "ResyncSidecar"):
        assert f'"what":"EncryptionAdmin/{method}"' in text
    assert '"what":"RaftAdmin/RemoveServer"' in text
    assert '"result":"ok"' in text
    assert '"result":"EncryptionConflict"' in text
    assert '"result":"InvalidArgument"' in text


class Holders:
    """Everything in the process that stands for a key."""

    def __init__(self, lived: Lived) -> None:
        directory = lived.node.directory
        self.kek = FileKekProvider(lived.kek).load()
        self.applier = Applier(disk=OsDisk(), read_row=lambda key: None, kek=self.kek,
                               keystore=Keystore(), sidecar_path=directory / RELATIVE_PATH)
        self.applier.load()
        self.keystore = self.applier.keystore
        self.handle = self.keystore.get(self.keystore.ids()[0])

    def all(self) -> list[object]:
        return [self.kek, self.applier, self.keystore, self.handle]


def test_no_text_of_a_key_object_shows_the_key(lived: Lived) -> None:
    holders = Holders(lived)
    assert len(holders.keystore) == DEKS
    for each in holders.all():
        for text in (repr(each), str(each), format(each), repr([each]), repr(vars(holders))):
            assert found(text.encode(), lived.keys) == []


def test_no_key_object_can_be_pickled(lived: Lived) -> None:
    for each in Holders(lived).all():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises((TypeError, AttributeError, pickle.PicklingError)) as caught:
                pickle.dumps(each, protocol)
            assert found(repr(caught.value).encode(), lived.keys) == []


def told_with_locals(caught: pytest.ExceptionInfo[ElasticKVError]) -> str:
    """The traceback with the locals of every frame but the test's own, which holds the keys."""
    frames = caught.tb.tb_next
    assert frames is not None
    told = traceback.TracebackException(type(caught.value), caught.value, frames,
                                        capture_locals=True)
    return "".join(told.format())


def test_a_traceback_with_locals_shows_no_key(lived: Lived) -> None:
    holders = Holders(lived)
    sidecar = holders.applier.sidecar
    assert sidecar is not None
    wrapped = next(iter(sidecar.keys.values())).wrapped
    other = Kek(bytes(32), "another file")
    path = lived.node.directory / RELATIVE_PATH
    failures: list[Callable[[], object]] = [
        lambda: other.unwrap_handle(wrapped, 1, KeyPurpose.STORAGE),
        lambda: holders.kek.unwrap(wrapped[:-1] + bytes([wrapped[-1] ^ 1])),
        lambda: Applier(disk=OsDisk(), read_row=lambda key: None, kek=other, keystore=Keystore(),
                        sidecar_path=path).load(),
    ]
    for fail in failures:
        with pytest.raises(KekError) as caught:
            fail()
        text = told_with_locals(caught)
        assert "in unwrap" in text
        assert "wrapped = " in text
        assert caught.value.__suppress_context__
        assert found(text.encode(), lived.keys) == []


@pytest.mark.parametrize(("make", "size"), [
    (partial(KeyHandle, 1, KeyPurpose.STORAGE), 31),
    (partial(KeyHandle, 0, KeyPurpose.STORAGE), 32),
    (Kek, 33),
], ids=["short DEK", "no key id", "KEK with a line end"])
def test_what_refuses_a_key_does_not_tell_it(make: Callable[[bytes], object], size: int) -> None:
    secret = bytes(range(100, 100 + size))
    with pytest.raises(ElasticKVError) as caught:
        make(secret)
    text = told_with_locals(caught)
    assert "size = " in text
    assert found(text.encode(), {"secret": secret}) == []
