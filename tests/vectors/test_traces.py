"""Replays what the Go applier did, entry by entry, and compares the state after each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vector_files

from elastickv import wire
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import Keystore
from elastickv.durable import OsDisk
from elastickv.errors import ApplyHalted, WireError
from elastickv.keys.applier import Applier

DECODERS = {
    "registration": wire.decode_registration_payload,
    "bootstrap": wire.decode_bootstrap_payload,
    "rotation": wire.decode_rotation_payload,
}
FILE_FIELDS = {"kek", "traces"}
RESULTS = {"ok", "ErrEncryptionApply", "ErrKeyConflict", "error"}
CREATED = "2026-01-02T03:04:05Z"
Step = dict[str, Any]


def trace_cases() -> list[Any]:
    return [pytest.param(document["kek"], trace["ops"], id=f"{path.name}-{trace['trace']}")
            for path in vector_files.find("traces")
            for document in (vector_files.read(path),) for trace in document["traces"]]


class Node:
    """An applier with its own directory and the registry rows a store would hold."""

    def __init__(self, directory: Path, kek: str) -> None:
        self.path = directory / "encryption" / "keys.json"
        self.rows: dict[bytes, bytes] = {}
        self.applier = Applier(disk=OsDisk(), read_row=lambda key: self.rows.get(key),
                               kek=Kek(bytes.fromhex(kek)), keystore=Keystore(),
                               sidecar_path=self.path, now=lambda: CREATED)

    def apply(self, step: Step) -> None:
        entry = DECODERS[step["op"]](bytes.fromhex(step["payload"]))
        self.rows.update(self.applier.apply(step["raft_index"], entry))

    def sidecar_bytes(self) -> bytes | None:
        return self.path.read_bytes() if self.path.exists() else None

    def state(self) -> Step:
        """In the form of the trace."""
        sidecar = self.applier.sidecar
        return {
            "sidecar": sidecar and {
                "active": {"storage": sidecar.active_storage, "raft": sidecar.active_raft},
                "keys": {str(dek_id): {"purpose": key.purpose.label, "wrapped": key.wrapped.hex(),
                                       "local_epoch": key.local_epoch}
                         for dek_id, key in sidecar.keys.items()},
                "raft_applied_index": sidecar.raft_applied_index,
                "storage_envelope_active": sidecar.storage_envelope_active,
                "storage_envelope_cutover_index": sidecar.storage_envelope_cutover_index,
                "raft_envelope_cutover_index": sidecar.raft_envelope_cutover_index,
            },
            "registry": {key.hex(): value.hex() for key, value in self.rows.items()},
            "keystore": list(self.applier.keystore.ids()),
        }


def expected(state: Step) -> Step:
    """The trace's state; its sidecar may carry the file's version, and empty may be null."""
    sidecar = state["sidecar"]
    if sidecar:
        sidecar = {name: value for name, value in sidecar.items() if name != "version"}
        sidecar["keys"] = {dek_id: {name: value for name, value in key.items() if name != "created"}
                           for dek_id, key in sidecar["keys"].items()}
    return {"sidecar": sidecar or None, "registry": state["registry"] or {},
            "keystore": state["keystore"] or []}


def test_every_trace_file_has_only_known_fields() -> None:
    for path in vector_files.find("traces"):
        document = vector_files.read(path)
        assert set(document) == FILE_FIELDS, f"{path.name} holds a section without a check"
        steps = [step for trace in document["traces"] for step in trace["ops"]]
        assert {step["op"] for step in steps} <= set(DECODERS)
        assert {step["result"] for step in steps} <= RESULTS


@pytest.mark.parametrize(("kek", "steps"), trace_cases())
def test_trace(kek: str, steps: list[Step], tmp_path: Path) -> None:
    node = Node(tmp_path, kek)
    for step in steps:
        before, bytes_before = node.state(), node.sidecar_bytes()
        handles = {key_id: node.applier.keystore.get(key_id)
                   for key_id in node.applier.keystore.ids()}
        if step["result"] == "ok":
            node.apply(step)
            assert node.state() == expected(step["state"])
            sidecar = node.applier.sidecar
            assert node.sidecar_bytes() == (None if sidecar is None else sidecar.encode())
        else:
            with pytest.raises((ApplyHalted, WireError)):
                node.apply(step)
            assert node.state() == before
            assert node.sidecar_bytes() == bytes_before
            assert all(node.applier.keystore.get(key_id) is handle
                       for key_id, handle in handles.items())


def crash_points(count: int) -> Iterator[tuple[int, int]]:
    """(store at step i, sidecar at step j >= i); all pairs for short traces, the edges for long."""
    for store_step in range(count + 1):
        later = range(store_step, count + 1)
        wanted = set(later) if count <= 8 else {store_step, *later[1:2], count}
        yield from ((store_step, sidecar_step) for sidecar_step in sorted(wanted))


@pytest.mark.parametrize(("kek", "steps"), trace_cases())
def test_replay_from_any_earlier_point_ends_in_the_same_state(
        kek: str, steps: list[Step], tmp_path: Path) -> None:
    accepted = [step for step in steps if step["result"] == "ok"]
    first = Node(tmp_path / "first", kek)
    rows_at, sidecar_at = [dict(first.rows)], [first.sidecar_bytes()]
    for step in accepted:
        first.apply(step)
        rows_at.append(dict(first.rows))
        sidecar_at.append(first.sidecar_bytes())
    for store_step, sidecar_step in crash_points(len(accepted)):
        again = Node(tmp_path / f"{store_step}-{sidecar_step}", kek)
        again.rows = dict(rows_at[store_step])
        data = sidecar_at[sidecar_step]
        if data is not None:
            again.path.parent.mkdir(parents=True)
            again.path.write_bytes(data)
        again.applier.load()
        for step in accepted[store_step:]:
            again.apply(step)
        assert again.state() == first.state()
        assert again.sidecar_bytes() == first.sidecar_bytes()
