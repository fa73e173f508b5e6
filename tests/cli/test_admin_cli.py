"""`elastickv admin` against a real server."""

from __future__ import annotations

import pytest
from cli_shell import Shell
from memory_node import MemoryNode

from elastickv.cli.main import run
from elastickv.crypto.nonce import full_node_id, node_id16
from elastickv.errors import ExitCode, NoLeader, OutcomeUnknown
from elastickv.raft.engine import EngineStatus


def test_from_bootstrap_to_rotation(shell: Shell, memory_node: MemoryNode) -> None:
    made = shell("admin", "encryption", "bootstrap", "--output", "json")
    assert made.document == {"applied_index": 1, "storage_dek_id": 1, "raft_dek_id": 2}
    storage = shell("admin", "encryption", "enable-storage-envelope", "--output", "json").document
    assert (storage["cutover_index"], storage["was_already_active"]) == (2, False)
    assert [member["full_node_id"] for member in storage["members"]] == [full_node_id("n1")]
    raft = shell("admin", "encryption", "enable-raft-envelope")
    assert b"cutover index       3" in raft.out
    assert b"capable" in raft.out
    again = shell("admin", "encryption", "enable-raft-envelope", "--output", "json").document
    assert again == {"cutover_index": 3, "was_already_active": True, "members": []}
    rotated = shell("admin", "encryption", "rotate-dek", "--purpose", "raft", "--output", "json")
    assert rotated.document == {"purpose": "raft", "applied_index": 4, "new_dek_id": 3}
    assert memory_node.encryption.proposals == ["bootstrap", "enable storage", "enable raft",
                                                "rotate raft"]


def test_no_command_prints_key_material(shell: Shell, memory_node: MemoryNode) -> None:
    for words in (["bootstrap"], ["rotate-dek", "--purpose", "storage"], ["status"],
                  ["enable-storage-envelope"]):
        for output in ("table", "json"):
            done = shell("admin", "encryption", *words, "--output", output)
            assert b"www" not in done.out
            assert b"d3d3" not in done.out
    assert memory_node.encryption.state is not None


def test_an_old_cutover_of_unknown_index(shell: Shell) -> None:
    shell("admin", "encryption", "bootstrap")
    shell("admin", "encryption", "enable-storage-envelope")
    again = shell("admin", "encryption", "enable-storage-envelope", "--output", "json").document
    assert (again["cutover_index"], again["was_already_active"]) == (None, True)


def test_encryption_status(shell: Shell) -> None:
    shell("admin", "encryption", "bootstrap")
    done = shell("admin", "encryption", "status")
    assert done.code == 0
    header, ours, gone = (dict(zip(done.lines[0], line, strict=False)) for line in done.lines[:3])
    assert "problems" not in header
    assert (ours["member"], ours["capable"], ours["storage_dek_id"]) == ("n1", "yes", "1")
    assert (gone["member"], gone["reachable"], gone["capable"]) == ("gone", "no", "-")
    assert done.lines[3] == ["problem: gone: unreachable (no answer)"]
    document = shell("admin", "encryption", "status", "--output", "json").document
    assert [row["member"] for row in document] == ["n1", "gone"]
    assert document[1]["problems"] == ["unreachable (no answer)"]
    assert document[0]["deks"] == [
        {"dek_id": 1, "purpose": "storage", "active": True, "writer_state": "confirmed",
         "epoch": 1, "local_epoch": 1, "writes": 5, "writes_left": 95}]
    assert (document[0]["storage_writes_left"], document[0]["raft_writes_left"]) == (95, None)
    assert document[1]["storage_dek_id"] is None


def test_register_writer(shell: Shell, memory_node: MemoryNode) -> None:
    shell("admin", "encryption", "bootstrap")
    done = shell("admin", "encryption", "register-writer", "--dek-id", "1", "--writer", "n4=1",
                 "--writer-id", "0x123=65535", "--output", "json")
    assert done.document == {"applied_index": 2, "writers": 2}
    assert memory_node.encryption.proposals[-1] == "register 2 under 1"


@pytest.mark.parametrize("arguments", [
    [], ["--writer", "n4"], ["--writer", "n4=x"], ["--writer", "n4=65536"], ["--writer", "n4=-1"],
    ["--writer", "a b=1"], ["--writer-id", "n4=1"], ["--writer-id", "0=1"],
    ["--writer-id", f"{1 << 64}=1"]])
def test_writers_that_are_none(shell: Shell, memory_node: MemoryNode,
                               arguments: list[str]) -> None:
    done = shell("admin", "encryption", "register-writer", "--dek-id", "1", *arguments)
    assert done.code == ExitCode.USAGE
    assert memory_node.encryption.proposals == []


@pytest.mark.parametrize("arguments", [
    ["register-writer", "--writer", "n4=1"], ["register-writer", "--dek-id", "0"],
    ["rotate-dek"], ["rotate-dek", "--purpose", "both"], ["probe-node-id"],
    ["probe-node-id", "not an id"]])
def test_usage_errors(shell: Shell, arguments: list[str]) -> None:
    assert shell("admin", "encryption", *arguments).code == ExitCode.USAGE


def test_a_gate_that_is_off(shell: Shell, memory_node: MemoryNode) -> None:
    memory_node.encryption.gate = False
    done = shell("admin", "encryption", "bootstrap")
    assert (done.code, done.out) == (ExitCode.ERROR, b"")
    assert "--encryption-enabled" in done.err


def test_a_second_bootstrap_and_an_unknown_outcome(shell: Shell, memory_node: MemoryNode) -> None:
    shell("admin", "encryption", "bootstrap")
    assert "already bootstrapped" in shell("admin", "encryption", "bootstrap").err
    memory_node.faults.errors.append(OutcomeUnknown("who knows"))
    done = shell("admin", "encryption", "rotate-dek", "--purpose", "storage")
    assert done.code == ExitCode.OUTCOME_UNKNOWN


# --- offline ---------------------------------------------------------------------------------


def colliding_ids() -> tuple[str, str]:
    """Two ids with equal low 16 bits, found as an operator would stumble upon them."""
    seen: dict[int, str] = {}
    for number in range(1 << 17):
        raft_id = f"node-{number}"
        short = node_id16(full_node_id(raft_id))
        if short in seen:
            return seen[short], raft_id
        seen[short] = raft_id
    raise AssertionError("the pigeonhole principle failed")


def test_probe_node_id_needs_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["admin", "encryption", "probe-node-id", "n1", "n2", "n1"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["n1", str(full_node_id("n1")), f"{full_node_id('n1'):#018x}",
                        str(node_id16(full_node_id("n1")))]
    assert [line[0] for line in lines] == ["raft_id", "n1", "n2"]


def test_probe_node_id_finds_collisions(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = colliding_ids()
    assert run(["admin", "encryption", "probe-node-id", "n1", one, other]) == ExitCode.ERROR
    captured = capsys.readouterr()
    assert f"{one} and {other}" in captured.err
    assert len(captured.out.splitlines()) == 4


# --- raft ------------------------------------------------------------------------------------


def test_raft_status(shell: Shell, memory_node: MemoryNode) -> None:
    shell("admin", "raft", "add-learner", "n2", "127.0.0.1:2")
    rows = shell("admin", "raft", "status", "--output", "json").document
    assert [(row["member"], row["role"], row["suffrage"]) for row in rows] == [
        ("n1", "leader", "voter"), ("n2", "unreachable", "learner")]
    assert (rows[0]["address"], rows[0]["leader"], rows[0]["term"]) == (
        memory_node.address, "n1", 3)
    assert rows[1]["term"] is None
    assert shell("admin", "raft", "status").lines[2][:2] == ["n2", "learner"]


def test_membership(shell: Shell, memory_node: MemoryNode) -> None:
    assert shell("admin", "raft", "add-learner", "n2", "127.0.0.1:2", "--previous-index", "1",
                 "--output", "json").document == {"configuration_index": 2}
    refused = shell("admin", "raft", "add-voter", "n3", "127.0.0.1:3", "--previous-index", "1")
    assert (refused.code, "stands at 2" in refused.err) == (ExitCode.ERROR, True)
    assert shell("admin", "raft", "add-voter", "n3", "127.0.0.1:3").code == 0
    assert shell("admin", "raft", "promote", "n2", "--skip-min-applied-check").code == 0
    assert shell("admin", "raft", "remove", "n3").code == 0
    assert [member.node_id for member in memory_node.engine.configuration] == ["n1", "n2"]
    done = shell("admin", "raft", "transfer", "n2", "--output", "json")
    assert done.document == {"leader": "n2", "term": 3}


def test_a_transfer_after_which_nobody_can_be_asked_succeeded(
        shell: Shell, memory_node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered() -> EngineStatus:
        raise NoLeader("just left")

    monkeypatch.setattr(memory_node.engine, "status", unanswered)
    done = shell("admin", "raft", "transfer", "n2", "--timeout", "0.3", "--output", "json")
    assert (done.code, done.document) == (ExitCode.OK, {"leader": None, "term": None})
    assert memory_node.engine.leader_id == "n2"
    assert done.err == "leadership was handed over; who leads now could not be asked: just left\n"


@pytest.mark.parametrize("command", [
    "encryption status", "encryption bootstrap", "encryption rotate-dek",
    "encryption register-writer", "encryption enable-storage-envelope",
    "encryption enable-raft-envelope", "encryption probe-node-id", "raft status", "raft add-voter",
    "raft add-learner", "raft promote", "raft remove", "raft transfer"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["admin", *command.split(), "--help"]) == 0
    assert f"  elastickv admin {command}" in capsys.readouterr().out
