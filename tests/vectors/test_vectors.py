"""Byte compatibility with the Go implementation: one case per vector, in both directions where the
operation is deterministic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vector_files

from elastickv import wire
from elastickv.crypto.cipher import open_raft, open_value, seal_raft, seal_value
from elastickv.crypto.envelope import FLAG_SNAPPY, parse_envelope, raft_aad, storage_aad
from elastickv.crypto.kek import Kek
from elastickv.crypto.keystore import KeyHandle, Keystore, Purpose
from elastickv.crypto.nonce import NonceFactory, full_node_id, node_id16
from elastickv.errors import CorruptionError, IntegrityError, KekError, WireError
from elastickv.keys import registry, sidecar

Case = dict[str, Any]


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


def row(case: Case) -> wire.RegistryRow:
    return wire.RegistryRow(case["dek_id"], int(case["full_node_id"]), case["local_epoch"])


def check_payload(opcode: wire.Opcode, payload: bytes, entry: wire.EncryptionEntry,
                  encode: Callable[[Any], bytes],
                  decode: Callable[[bytes], wire.EncryptionEntry]) -> None:
    assert encode(entry) == payload
    assert decode(payload) == entry
    whole = bytes((opcode,)) + payload
    assert wire.encode_entry(entry) == whole
    assert wire.decode_entry(whole) == entry
    with pytest.raises(WireError):
        decode(payload + b"\x00")
    with pytest.raises(WireError):
        decode(payload[:-1])


def check_registration(case: Case) -> None:
    check_payload(wire.Opcode.REGISTRATION, raw(case["hex"]), wire.Registration(row(case["in"])),
                  wire.encode_registration_payload, wire.decode_registration_payload)


def check_bootstrap(case: Case) -> None:
    entry = wire.Bootstrap(case["storage_dek_id"], raw(case["wrapped_storage"]),
                           case["raft_dek_id"], raw(case["wrapped_raft"]),
                           tuple(row(item) for item in case["batch_registry"] or ()))
    check_payload(wire.Opcode.BOOTSTRAP, raw(case["hex"]), entry,
                  wire.encode_bootstrap_payload, wire.decode_bootstrap_payload)


def check_rotation(case: Case) -> None:
    entry = wire.Rotation(wire.RotationTag(case["sub_tag"]), case["dek_id"], case["purpose"],
                          raw(case["wrapped"]), row(case["proposer"]))
    check_payload(wire.Opcode.ROTATION, raw(case["hex"]), entry,
                  wire.encode_rotation_payload, wire.decode_rotation_payload)


def check_registry_row(case: Case) -> None:
    key, value = raw(case["key"]), raw(case["value"])
    record = registry.WriterRecord(int(case["full_node_id"]), case["first_seen"],
                                   case["last_seen"])
    assert registry.row_key(case["dek_id"], case["node_id16"]) == key
    assert registry.decode_row_key(key) == (case["dek_id"], case["node_id16"])
    assert registry.encode_row_value(record) == value
    assert registry.decode_row_value(value) == record
    assert node_id16(record.full_node_id) == case["node_id16"]


def check_nonce(case: Case) -> None:
    factory = NonceFactory(case["node_id16"], case["local_epoch"])
    assert [factory.next().hex() for _ in case["first_three"]] == case["first_three"]
    assert factory.count == len(case["first_three"])


def damaged(data: bytes) -> list[bytes]:
    """One bit flipped in every byte, and each end cut off."""
    flipped = [data[:i] + bytes((data[i] ^ 1,)) + data[i + 1:] for i in range(len(data))]
    return [*flipped, data[:-1], data[1:], data + b"\x00"]


def check_storage_envelope(case: Case) -> None:
    nonce, plaintext, header = raw(case["nonce"]), raw(case["plaintext"]), raw(case["value_header"])
    store_key, sealed = raw(case["store_key"]), raw(case["envelope"])
    handle = KeyHandle(case["key_id"], Purpose.STORAGE, raw(case["dek"]))
    keystore = Keystore({handle.key_id: handle})
    envelope = parse_envelope(sealed)
    assert (envelope.key_id, envelope.nonce) == (case["key_id"], nonce)
    assert storage_aad(envelope.version, envelope.flag, envelope.key_id, header,
                       store_key) == raw(case["aad"])
    if not envelope.flag & FLAG_SNAPPY:  # Snappy has many valid outputs for one input
        assert seal_value(handle, nonce, header, store_key, plaintext,
                          version=envelope.version) == sealed
    assert open_value(keystore, header, store_key, sealed) == plaintext
    for other in damaged(sealed):
        with pytest.raises(IntegrityError):
            open_value(keystore, header, store_key, other)
    with pytest.raises(IntegrityError):
        open_value(keystore, header, store_key + b"\x00", sealed)


def check_raft_envelope(case: Case) -> None:
    nonce, payload, sealed = raw(case["nonce"]), raw(case["payload"]), raw(case["envelope"])
    handle = KeyHandle(case["key_id"], Purpose.RAFT, raw(case["dek"]))
    keystore = Keystore({handle.key_id: handle})
    envelope = parse_envelope(sealed)
    assert raft_aad(envelope.version, case["key_id"]) == raw(case["aad"])
    assert seal_raft(handle, nonce, payload, envelope.version) == sealed
    assert open_raft(keystore, sealed) == payload
    for other in damaged(sealed):
        with pytest.raises(IntegrityError):
            open_raft(keystore, other)


def check_kek_file_wrap(case: Case) -> None:
    kek, dek, wrapped = Kek(raw(case["kek"])), raw(case["dek"]), raw(case["wrapped"])
    assert kek.unwrap(wrapped) == dek
    assert kek.unwrap(kek.wrap(dek)) == dek
    for other in damaged(wrapped):
        with pytest.raises(KekError):
            kek.unwrap(other)


def check_node_id(case: Case) -> None:
    assert full_node_id(case["raft_id"]) == int(case["full_node_id"])
    assert node_id16(int(case["full_node_id"])) == case["node_id16"]


CHECKS: dict[str, Callable[[Case], None]] = {
    "registration": check_registration,
    "bootstrap": check_bootstrap,
    "rotation": check_rotation,
    "registry_row": check_registry_row,
    "nonce": check_nonce,
    "storage_envelope": check_storage_envelope,
    "raft_envelope": check_raft_envelope,
    "kek_file_wrap": check_kek_file_wrap,
    "node_id": check_node_id,
}


def vector_cases() -> list[Any]:
    return [pytest.param(section, case, id=f"{path.name}-{section}-{number}")
            for path in vector_files.find("vectors")
            for section, cases in vector_files.read(path).items()
            for number, case in enumerate(cases or ())]


def section_names() -> list[Any]:
    return [pytest.param(section, id=f"{path.name}-{section}")
            for path in vector_files.find("vectors") for section in vector_files.read(path)]


def key_files() -> list[Any]:
    return [pytest.param(path, id=path.name) for path in vector_files.find("keys")]


def test_the_folder_holds_vector_files() -> None:
    where = vector_files.folder()
    assert any(vector_files.find(kind) for kind in vector_files.KINDS), \
        f"no vector files in {where}"


@pytest.mark.parametrize("section", section_names())
def test_every_section_is_checked(section: str) -> None:
    assert section in CHECKS, f"no check for section {section!r}"


@pytest.mark.parametrize(("section", "case"), vector_cases())
def test_vector(section: str, case: Case) -> None:
    CHECKS[section](case)


@pytest.mark.parametrize("path", key_files())
def test_a_written_sidecar_reads_and_writes_the_same(path: Path) -> None:
    data = vector_files.read_bytes(path)
    document = vector_files.read(path)
    parsed = sidecar.parse(data)
    assert parsed.raft_applied_index == document["raft_applied_index"]
    assert (parsed.active_storage, parsed.active_raft) == (
        document["active"]["storage"], document["active"]["raft"])
    assert {str(dek_id) for dek_id in parsed.keys} == set(document["keys"])
    assert sidecar.parse(parsed.encode()) == parsed
    if document["version"] == sidecar.VERSION:
        assert parsed.encode() == data


@pytest.mark.parametrize("path", key_files())
def test_a_written_sidecar_opens_under_the_kek(path: Path) -> None:
    parsed = sidecar.parse(vector_files.read_bytes(path))
    keks = [Kek(key) for key in vector_files.keks()]
    assert keks, "no kek_file_wrap vector names the KEK"
    assert any(opens(kek, parsed) for kek in keks)
    assert not opens(Kek(bytes(32)), parsed)


def opens(kek: Kek, parsed: sidecar.Sidecar) -> bool:
    try:
        handles = [kek.unwrap_handle(key.wrapped, dek_id, key.purpose)
                   for dek_id, key in parsed.keys.items()]
    except KekError:
        return False
    return bool(handles)


@pytest.mark.parametrize("path", key_files())
def test_a_damaged_sidecar_never_raises_another_error(path: Path) -> None:
    """Cut anywhere it is refused; a changed byte is refused or leaves a file that is valid."""
    data = vector_files.read_bytes(path)
    for length in range(len(data)):
        with pytest.raises(CorruptionError):
            sidecar.parse(data[:length])
    for position in range(len(data)):
        for flip in (0x01, 0x80):
            changed = bytearray(data)
            changed[position] ^= flip
            with contextlib.suppress(CorruptionError):  # any other error fails the test
                sidecar.parse(bytes(changed)).validate()
