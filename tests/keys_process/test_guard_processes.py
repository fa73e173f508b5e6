"""Each start-up guard as a node that refuses to start: exit code 3, the guard's name, the remedy;
and `elastickv doctor` that says the same of the same directory.

Real processes on a real data directory: a cluster of one is bootstrapped once, copied for each
case, and spoilt in one way.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from elastickv.crypto.kek_file import FileKekProvider, write_kek_file
from elastickv.crypto.nonce import full_node_id, node_id16
from elastickv.data_directory import program
from elastickv.durable import OsDisk
from elastickv.errors import ExitCode
from elastickv.keys import sidecar as sidecar_file
from elastickv.keys.guards import GUARDS
from elastickv.keys.registry import WriterRecord, encode_row_value, row_key
from elastickv.keys.sidecar import RELATIVE_PATH, Sidecar
from elastickv.kv.fsm import META_RAFT_CUTOVER_INDEX, META_SIDECAR
from elastickv.raft.hardstate import FILE_NAME, HardStateFile
from elastickv.store.lmdb_backend import LmdbBackend
from elastickv.store.mvcc_store import Store, encode_number
from tests.cluster.cluster import Cluster, NodeProcess
from tests.keys_process.doctor_shell import BOUND_BY_MODES, doctor, elastickv, refused_start

pytestmark = [pytest.mark.cluster]

NODE = "n1"
NO_WRITES = ("prlimit", "--fsize=0")
"""Every write to a regular file fails, as on a file system that takes none."""


@dataclass
class Case:
    """One spoilt directory: how its node is started."""

    directory: Path
    kek: Path
    arguments: list[str]

    def sidecar(self) -> Sidecar:
        found = sidecar_file.load(OsDisk(), self.directory / RELATIVE_PATH)
        assert found is not None
        return found

    def sidecar_bytes(self) -> bytes | None:
        path = self.directory / RELATIVE_PATH
        return path.read_bytes() if path.exists() else None

    def write(self, sidecar: Sidecar) -> None:
        sidecar_file.store(OsDisk(), self.directory / RELATIVE_PATH, sidecar)

    def with_epoch(self, epoch: int) -> None:
        """The active storage DEK's epoch in the sidecar."""
        sidecar = self.sidecar()
        dek_id = sidecar.active_storage
        self.write(sidecar.with_key(dek_id, replace(sidecar.keys[dek_id], local_epoch=epoch)))

    def change_store(self, *, rows: list[tuple[bytes, bytes]] | None = None,
                     meta: dict[bytes, bytes] | None = None) -> None:
        store = Store.open(LmdbBackend(self.directory / "store"))
        store.apply_group(store.applied_index + 1, (), rows=rows or [], meta=meta or {})
        store.flush_now()
        store.close()

    def without(self, flag: str, values: int = 1) -> None:
        at = self.arguments.index(flag)
        del self.arguments[at:at + 1 + values]


def twin_of(raft_id: str) -> str:
    """A raft id whose 16-bit node id is that of `raft_id`."""
    wanted = node_id16(full_node_id(raft_id))
    number = 0
    while node_id16(full_node_id(f"twin-{number}")) != wanted:
        number += 1
    return f"twin-{number}"


def no_kek(case: Case) -> None:
    case.without("--kekFile")


def kek_readable_by_others(case: Case) -> None:
    case.kek.chmod(0o640)


def kek_too_short(case: Case) -> None:
    case.kek.write_bytes(bytes(31))


def one_key_under_two_ids(case: Case) -> None:
    """As somebody who can write the disk and does not have the KEK can make it."""
    sidecar = case.sidecar()
    wrapped = sidecar.keys[sidecar.active_raft].wrapped
    changed = sidecar.with_key(sidecar.active_storage, replace(
        sidecar.keys[sidecar.active_storage], wrapped=wrapped))
    case.write(changed)
    case.change_store(meta={META_SIDECAR: changed.encode()})


def no_flag(case: Case) -> None:
    case.without("--encryption-enabled", values=0)


def another_kek(case: Case) -> None:
    case.kek.unlink()
    write_kek_file(case.kek)


def exhausted_epoch(case: Case) -> None:
    case.with_epoch(0xFFFF)


def old_epoch(case: Case) -> None:
    case.with_epoch(0)


def old_sidecar(case: Case) -> None:
    sidecar = case.sidecar()
    case.write(replace(sidecar, raft_applied_index=1, storage_envelope_active=False,
                       storage_envelope_cutover_index=0, raft_envelope_cutover_index=0))


def foreign_sidecar(case: Case) -> None:
    """Of another cluster under the same KEK, and further along."""
    kek = FileKekProvider(case.kek).load()
    sidecar = case.sidecar()
    keys = {dek_id ^ 1: replace(key, wrapped=kek.generate_wrapped_dek())
            for dek_id, key in sidecar.keys.items()}
    case.write(replace(sidecar, raft_applied_index=sidecar.raft_applied_index + 1000, keys=keys,
                       active_storage=sidecar.active_storage ^ 1,
                       active_raft=sidecar.active_raft ^ 1))


def foreign_cutover(case: Case) -> None:
    """Of a cluster that went on otherwise from the same backup: ahead, with an earlier cutover."""
    sidecar = case.sidecar()
    case.write(replace(sidecar, raft_applied_index=sidecar.raft_applied_index + 1000,
                       storage_envelope_cutover_index=1))


def left_over_sidecar(case: Case) -> None:
    """As whoever wants a fresh node leaves it."""
    for name in ("raft", "store"):
        shutil.rmtree(case.directory / name)


def registered_twin(case: Case) -> None:
    twin = full_node_id(twin_of(NODE))
    case.change_store(rows=[(row_key(case.sidecar().active_raft, node_id16(twin)),
                             encode_row_value(WriterRecord(twin, 1, 1)))])


def another_members_directory(case: Case) -> None:
    HardStateFile(OsDisk(), case.directory / "raft" / FILE_NAME).begin_boot("n9")


def founding_twin(case: Case) -> None:
    at = case.arguments.index("--raftBootstrapMembers") + 1
    case.arguments[at] += f",{twin_of(NODE)}=127.0.0.1:1"


def other_cutover(case: Case) -> None:
    index = case.sidecar().raft_envelope_cutover_index
    case.change_store(meta={META_RAFT_CUTOVER_INDEX: encode_number(index + 1)})


def damaged_store(case: Case) -> None:
    path = next((case.directory / "store").glob("gen-*.mdb"))
    with path.open("r+b") as file:
        file.seek(0)
        file.write(b"\xff" * 8192)


CASES: dict[str, list[tuple[Callable[[Case], None], str]]] = {
    "raft-id": [(another_members_directory, "do not empty it")],
    "kek-required": [(no_kek, "--kekFile")],
    "kek-insecure": [(kek_readable_by_others, "chmod 600")],
    "kek-readable": [(kek_too_short, "raw key")],
    "sidecar-readable": [(one_key_under_two_ids, "resync-sidecar")],
    "sidecar-without-flag": [(no_flag, "--encryption-enabled")],
    "kek-unwraps": [(another_kek, "bootstrapped with")],
    "epoch-exhausted": [(exhausted_epoch, "resync-sidecar")],
    "epoch-rollback": [(old_epoch, "resync-sidecar")],
    "sidecar-behind-log": [(old_sidecar, "resync-sidecar")],
    "sidecar-foreign": [(foreign_sidecar, "move it away"), (left_over_sidecar, "move it away"),
                        (foreign_cutover, "join it anew")],
    "node-id-collision": [(registered_twin, "--raftId"), (founding_twin, "--raftId")],
    "cutover-divergence": [(other_cutover, "resync-sidecar")],
}
ELSEWHERE = {"data-directory", "file-system", "store-readable"}
"""Guards whose process tests are below: the node meets their cause before it runs the guards."""

PARAMETERS = [pytest.param(guard, spoil, remedy, id=f"{guard}-{spoil.__name__}")
              for guard, cases in CASES.items() for spoil, remedy in cases]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sound(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NodeProcess]:
    """A stopped cluster of one, with both cutovers behind it."""
    cluster = Cluster(tmp_path_factory.mktemp("guards") / "cluster", size=1)
    try:
        await cluster.start()
        await cluster.encrypt()
        async with cluster.client() as client:
            await client.put(b"k", b"v")
        assert cluster.nodes[NODE].kill(signal.SIGTERM) == 0
        yield cluster.nodes[NODE]
    finally:
        cluster.stop()


@pytest.fixture
def case(sound: NodeProcess, tmp_path: Path) -> Case:
    """A copy of the sound directory, to be spoilt."""
    directory, kek = tmp_path / NODE, tmp_path / "kek"
    shutil.copytree(sound.directory, directory)
    shutil.copy2(sound.directory.parent / "kek", kek)
    arguments = [*sound.arguments]
    arguments[arguments.index("--raftDataDir") + 1] = str(directory)
    arguments[arguments.index("--kekFile") + 1] = str(kek)
    return Case(directory, kek, arguments)


def test_every_guard_has_a_process_test() -> None:
    assert set(CASES) | ELSEWHERE == {guard.name for guard in GUARDS}


def test_a_sound_node_may_start(case: Case) -> None:
    code, verdicts = doctor(case.arguments)
    assert code == ExitCode.OK
    assert {row["result"] for row in verdicts.values()} == {"pass"}


def test_a_node_may_start_with_another_wrapping_of_its_keys(case: Case) -> None:
    """As a crash leaves it after a rotation to a DEK that was known: the sidecar has the wrapping
    of that rotation, the store the one before."""
    kek, sidecar = FileKekProvider(case.kek).load(), case.sidecar()
    case.write(replace(sidecar, raft_applied_index=sidecar.raft_applied_index + 1000, keys={
        dek_id: replace(key, wrapped=kek.wrap(kek.unwrap(key.wrapped)))
        for dek_id, key in sidecar.keys.items()}))
    code, verdicts = doctor(case.arguments)
    assert {row["result"] for row in verdicts.values()} == {"pass"}
    assert code == ExitCode.OK


@pytest.mark.parametrize(("guard", "spoil", "remedy"), PARAMETERS)
def test_a_node_refuses_to_start_and_names_the_remedy(
        case: Case, sound: NodeProcess, guard: str, spoil: Callable[[Case], None],
        remedy: str) -> None:
    spoil(case)
    before = case.sidecar_bytes()
    code, errors = refused_start(sound, case.arguments)
    assert code == ExitCode.STARTUP_REFUSED, errors
    assert f"start-up guard {guard}" in errors
    assert remedy in errors.split("Remedy:")[-1]
    assert "Traceback" not in errors

    code, verdicts = doctor(case.arguments)
    assert code == ExitCode.ERROR
    failed = {name: row for name, row in verdicts.items() if row["result"] == "fail"}
    assert guard in failed
    assert failed[guard]["remedy"]
    assert case.sidecar_bytes() == before


def test_a_file_system_that_takes_no_write(case: Case, sound: NodeProcess) -> None:
    code, _, errors = elastickv("node", *case.arguments, launcher=NO_WRITES)
    assert code == ExitCode.STARTUP_REFUSED, errors
    assert "start-up guard file-system" in errors
    assert "Remedy: put --raftDataDir on" in errors
    assert "Traceback" not in errors
    code, out, _ = elastickv("doctor", *case.arguments, launcher=NO_WRITES)
    assert code == ExitCode.ERROR
    assert "file-system\tfail" in out
    assert not list(case.directory.glob(".probe*"))


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every file with its content, every directory with None. LMDB's table of readers is left out:
    whoever reads beside a writer has a line in it while it reads."""
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
            for path in directory.rglob("*") if not path.name.endswith("-lock")}


def test_doctor_changes_nothing_in_a_stopped_nodes_directory(case: Case) -> None:
    (case.directory / "LOCK").unlink()
    before = contents(case.directory)
    assert doctor(case.arguments)[0] == ExitCode.OK
    assert contents(case.directory) == before


async def test_doctor_beside_a_running_node(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", size=1)
    try:
        await cluster.start()
        await cluster.encrypt()
        async with cluster.client() as client:
            await client.put(b"k", b"v")
            node = cluster.nodes[NODE]
            code, verdicts = await asyncio.to_thread(doctor, node.arguments)
            assert code == ExitCode.ERROR
            assert {name for name, row in verdicts.items() if row["result"] != "pass"} == {
                "data-directory"}
            assert "a node runs on" in verdicts["data-directory"]["problem"]
            code, errors = await asyncio.to_thread(refused_start, node)
            assert code == ExitCode.STARTUP_REFUSED
            assert "start-up guard data-directory" in errors
            assert (await client.get(b"k")).value == b"v"
    finally:
        cluster.stop()


@pytest.mark.parametrize("mode", [0o000, 0o500], ids=["closed", "read-only"])
def test_a_directory_that_the_user_may_not_use(case: Case, mode: int) -> None:
    case.directory.chmod(mode)
    try:
        code, out, errors = elastickv("doctor", *case.arguments, launcher=BOUND_BY_MODES)
        assert code == ExitCode.ERROR, errors
        assert "data-directory\tfail" in out
        assert "Remedy: make the directory writable" in out
        assert errors == ""
        code, _, errors = elastickv("node", *case.arguments, launcher=BOUND_BY_MODES)
        assert code == ExitCode.STARTUP_REFUSED, errors
        assert "--raftDataDir" in errors.split("Remedy:")[-1]
        assert "Traceback" not in errors
    finally:
        case.directory.chmod(0o700)


def file_in_place_of_the_directory(case: Case) -> None:
    shutil.rmtree(case.directory)
    case.directory.write_bytes(b"")


def directory_in_place_of_the_sidecar(case: Case) -> None:
    path = case.directory / RELATIVE_PATH
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("spoil", "guard"), [
    (file_in_place_of_the_directory, "data-directory"),
    (directory_in_place_of_the_sidecar, "sidecar-readable")])
def test_files_of_the_wrong_kind(case: Case, sound: NodeProcess, spoil: Callable[[Case], None],
                                 guard: str) -> None:
    spoil(case)
    code, verdicts = doctor(case.arguments)
    assert code == ExitCode.ERROR
    assert verdicts[guard]["result"] == "fail"
    code, errors = refused_start(sound, case.arguments)
    assert code == ExitCode.STARTUP_REFUSED, errors
    assert "Traceback" not in errors


def test_a_damaged_store(case: Case, sound: NodeProcess) -> None:
    damaged_store(case)
    code, errors = refused_start(sound, case.arguments)
    assert code == ExitCode.CORRUPTION, errors
    code, verdicts = doctor(case.arguments)
    assert code == ExitCode.ERROR
    assert verdicts["store-readable"]["result"] == "fail"


def test_doctor_on_a_node_that_never_ran_makes_nothing(tmp_path: Path) -> None:
    code, verdicts = doctor(["--raftId", "n9", "--insecure", "--raftBootstrap",
                             "--raftDataDir", str(tmp_path / "new" / "data")])
    assert code == ExitCode.OK
    assert verdicts["file-system"]["result"] == "pass"
    assert verdicts["kek-unwraps"]["result"] == "not applicable"
    assert list(tmp_path.iterdir()) == []


def test_doctor_table_names_every_guard_and_the_remedy(case: Case) -> None:
    case.kek.chmod(0o644)
    code, out, errors = elastickv("doctor", *case.arguments)
    assert code == ExitCode.ERROR
    assert [line.split("\t")[0] for line in out.splitlines()[1:1 + len(GUARDS)]] == [
        guard.name for guard in GUARDS]
    assert "Remedy: chmod 600" in out
    assert errors == ""


def no_cluster(case: Case) -> None:
    shutil.rmtree(case.directory)
    case.without("--raftBootstrapMembers")


def directory_of_the_log_file(case: Case) -> None:
    (case.directory / "audit.log").unlink(missing_ok=True)
    (case.directory / "audit.log").mkdir()


def damaged(name: str) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        path = case.directory / "raft" / name
        content = bytearray(path.read_bytes() if path.exists() else b"EKSI" + bytes(20))
        content[-1] ^= 1
        path.write_bytes(content)

    return spoil


LATER = [
    pytest.param("cluster", no_cluster, ExitCode.STARTUP_REFUSED,
                 "if it has run before, check that --raftDataDir", id="cluster"),
    pytest.param("audit-log", directory_of_the_log_file, ExitCode.USAGE, "--audit-log",
                 id="audit-log"),
    *(pytest.param("raft-files", damaged(name), ExitCode.CORRUPTION, "join it anew",
                   id=f"raft-files-{name}") for name in ("hardstate", "members", "install"))]


@pytest.mark.parametrize(("check", "spoil", "code", "remedy"), LATER)
def test_doctor_finds_what_ends_a_start_after_the_guards(
        case: Case, sound: NodeProcess, check: str, spoil: Callable[[Case], None], code: ExitCode,
        remedy: str) -> None:
    spoil(case)
    before = contents(case.directory)
    doctors_code, verdicts = doctor(case.arguments)
    assert contents(case.directory) == before
    assert doctors_code == ExitCode.ERROR
    assert {name for name, row in verdicts.items() if row["result"] == "fail"} >= {check}
    assert remedy in verdicts[check]["remedy"]
    found, errors = refused_start(sound, case.arguments)
    assert found == code, errors
    assert verdicts[check]["problem"] in errors
    assert "Traceback" not in errors


async def test_doctor_finds_a_node_that_was_removed(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        await cluster.start()
        async with cluster.client() as client:
            await client.raft.remove_server("n3", timeout_s=20)
        assert await cluster.exit_code("n3") == ExitCode.REMOVED
        node = cluster.nodes["n3"]
        code, verdicts = await asyncio.to_thread(doctor, node.arguments)
        assert (code, verdicts["member"]["result"]) == (ExitCode.ERROR, "fail")
        assert "empty data directory" in verdicts["member"]["remedy"]
        found, _ = await asyncio.to_thread(refused_start, node)
        assert found == ExitCode.REMOVED
        code, verdicts = await asyncio.to_thread(doctor, cluster.nodes["n1"].arguments)
        assert verdicts["member"]["result"] == "pass"
    finally:
        cluster.stop()


async def test_a_node_that_was_killed_before_its_first_flush_belongs_to_its_cluster(
        tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", size=1, extra=["--flush-interval-ms", "60000"])
    try:
        await cluster.start()
        async with cluster.client() as client:
            await client.put(b"k", b"v")
        node = cluster.nodes[NODE]
        node.kill(signal.SIGKILL)
        at = node.arguments.index("--raftBootstrapMembers")
        del node.arguments[at:at + 2]
        _, verdicts = await asyncio.to_thread(doctor, node.arguments)
        assert verdicts["cluster"]["result"] == "pass"
        await cluster.start()
        async with cluster.client() as client:
            assert (await client.get(b"k")).value == b"v"
    finally:
        cluster.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_doctor_says_that_another_user_runs_the_node(case: Case) -> None:
    give_away(case.directory, 1)
    code, out, _ = elastickv("doctor", *case.arguments)
    assert code == ExitCode.OK
    assert "user\twarn" in out
    assert "sudo takes no ELASTICKV_ variable along" in out
    assert f"sudo -u {pwd.getpwuid(1).pw_name} {program()} doctor" in out


def give_away(directory: Path, user: int) -> None:
    for path in (directory, *directory.rglob("*")):
        os.chown(path, user, -1)
