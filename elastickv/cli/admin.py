"""`elastickv admin`: operate encryption and Raft."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import asdict
from pathlib import Path

import click

from elastickv.cli.connection import Connection, command
from elastickv.cli.output import (
    emit,
    emit_change,
    output_option,
    print_fields,
    print_table,
    progress,
)
from elastickv.client import (
    Client,
    CutoverResult,
    MemberEncryption,
    Purpose,
    RaftMember,
    RaftStatus,
    Writer,
)
from elastickv.config import parse_node_id
from elastickv.crypto.nonce import MAX_EPOCH, MAX_NODE_ID, full_node_id, node_id16
from elastickv.errors import ConfigError, ElasticKVError, ExitCode, NodeIdCollision

MEMBER_TIMEOUT_S = 2.0
_INDEX = click.IntRange(0, (1 << 64) - 1)


@click.group()
def admin() -> None:
    """Operate encryption and Raft."""


@admin.group()
def encryption() -> None:
    """Bootstrap, rotate and watch encryption. No command takes or prints key material."""


@admin.group()
def raft() -> None:
    """Watch and change the Raft group."""


# --- encryption ------------------------------------------------------------------------------


@command(encryption, "status", "elastickv admin encryption status --output json")
def encryption_status(connection: Connection, output: str) -> None:
    """A row per member: capable, active DEK ids, cutovers; then a line per problem."""
    members = connection.run(lambda api: api.encryption.members())
    rows = [encryption_row(member) for member in members]

    def table() -> None:
        print_table(rows, [name for name in rows[0] if name not in ("problems", "deks")]
                    if rows else [])
        for member in members:
            for problem in member.problems:
                click.echo(f"problem: {member.node_id}: {problem}")

    emit(rows, output, table=table)


def encryption_row(member: MemberEncryption) -> dict[str, object]:
    """One line of the status table; None where the member did not tell."""
    capability, sidecar = member.capability, member.sidecar
    writes_left = {dek.dek_id: dek.writes_left for dek in member.deks}
    return {
        "member": member.node_id,
        "reachable": member.reachable,
        "capable": capability.encryption_capable if capability else None,
        "bootstrapped": capability.sidecar_present if capability else None,
        "epoch": capability.local_epoch if capability else None,
        "storage_dek_id": sidecar.active_storage_id if sidecar else None,
        "raft_dek_id": sidecar.active_raft_id if sidecar else None,
        "storage_writes_left": writes_left.get(sidecar.active_storage_id) if sidecar else None,
        "raft_writes_left": writes_left.get(sidecar.active_raft_id) if sidecar else None,
        "storage_envelope": sidecar.storage_envelope_active if sidecar else None,
        "storage_cutover_index": sidecar.storage_envelope_cutover_index if sidecar else None,
        "raft_cutover_index": sidecar.raft_envelope_cutover_index if sidecar else None,
        "sidecar_index": sidecar.sidecar_index if sidecar else None,
        "applied_index": sidecar.latest_applied_index if sidecar else None,
        "problems": list(member.problems),
        "deks": [asdict(dek) for dek in member.deks],
    }


@command(encryption, "bootstrap", "elastickv admin encryption bootstrap")
def bootstrap(connection: Connection, output: str) -> None:
    """Give the cluster its first DEKs. The leader makes, wraps and replicates them."""
    show_change(connection.run(lambda api: api.encryption.bootstrap())._asdict(), output)


def show_change(fields: dict[str, object], output: str) -> None:
    """What an entry of the log came to, and its index."""
    emit_change(fields, output, f"the change was applied at index {fields['applied_index']}")


@command(encryption, "rotate-dek", "elastickv admin encryption rotate-dek --purpose storage")
@click.option("--purpose", required=True, type=click.Choice(["storage", "raft"]),
              help="Which DEK to replace: that of values or that of the log.")
def rotate_dek(connection: Connection, purpose: str, output: str) -> None:
    """Make a new DEK active. The leader makes it; old DEKs stay for reading."""
    chosen = Purpose[purpose.upper()]
    result = connection.run(lambda api: api.encryption.rotate_dek(chosen))
    show_change({"purpose": purpose, **result._asdict()}, output)


@command(encryption, "register-writer",
         "elastickv admin encryption register-writer --dek-id 7 --writer n4=1")
@click.option("--dek-id", required=True, type=click.IntRange(1, 0xFFFF_FFFF),
              help="The DEK; see `status`.")
@click.option("--writer", "names", multiple=True, metavar="<raft id>=<epoch>",
              help="A node by its --raftId. Repeatable.")
@click.option("--writer-id", "ids", multiple=True, metavar="<full node id>=<epoch>",
              help="A node by its 64-bit id, decimal or 0x... Repeatable.")
def register_writer(connection: Connection, dek_id: int, names: tuple[str, ...],
                    ids: tuple[str, ...], output: str) -> None:
    """Enter writers of a DEK into the registry. Nodes do that by themselves; this is for repair."""
    writers = [*(parse_writer(text, by_name=True) for text in names),
               *(parse_writer(text, by_name=False) for text in ids)]
    if not writers:
        raise ConfigError("no writer is given", remedy="give --writer or --writer-id")
    index = connection.run(lambda api: api.encryption.register_writers(dek_id, writers))
    show_change({"applied_index": index, "writers": len(writers)}, output)


def parse_writer(text: str, *, by_name: bool) -> Writer:
    """`n4=1` or `0x123=1`. Raises `ConfigError`."""
    flag = "--writer" if by_name else "--writer-id"
    node, equals, epoch_text = text.rpartition("=")
    try:
        if not equals:
            raise ValueError
        epoch = int(epoch_text)
        node_id = full_node_id(parse_node_id(node, flag)) if by_name else int(node, 0)
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not <node>=<epoch>",
                          remedy="for example --writer n4=1") from None
    if not 0 <= epoch <= MAX_EPOCH or not 0 < node_id <= MAX_NODE_ID:
        raise ConfigError(f"{flag}: {text!r} is out of range",
                          remedy=f"epochs go to {MAX_EPOCH}, node ids to 64 bits, from 1")
    return Writer(node_id, epoch)


@command(encryption, "enable-storage-envelope",
         "elastickv admin encryption enable-storage-envelope")
def enable_storage_envelope(connection: Connection, output: str) -> None:
    """From now on values are ciphertext. One-way. Every member must be capable."""
    show_cutover(connection.run(lambda api: api.encryption.enable_storage_envelope()), output)


@command(encryption, "enable-raft-envelope", "elastickv admin encryption enable-raft-envelope")
def enable_raft_envelope(connection: Connection, output: str) -> None:
    """From now on the log is ciphertext. One-way. Needs the storage envelope."""
    show_cutover(connection.run(lambda api: api.encryption.enable_raft_envelope()), output)


def show_cutover(result: CutoverResult, output: str) -> None:
    """When it took effect, and what each member had answered."""
    fields: dict[str, object] = {
        "cutover_index": None if result.cutover_index_unknown else result.applied_index,
        "was_already_active": result.was_already_active}
    members = [{"full_node_id": member.full_node_id, "capable": member.encryption_capable,
                "build": member.build_sha, "bootstrapped": member.sidecar_present}
               for member in result.members]

    def table() -> None:
        print_fields(fields)
        if members:
            print_table(members)

    emit_change({**fields, "members": members}, output, "the cutover has taken effect",
                table=table)


@command(encryption, "resync-sidecar",
         "elastickv admin encryption resync-sidecar --raftId n3 --raftDataDir /var/lib/elastickv"
         " --kekFile /etc/elastickv/kek.key --endpoints 10.0.0.1:50051,10.0.0.2:50051"
         " --tls-ca /etc/elastickv/ca.crt --tls-cert /etc/elastickv/n3.crt"
         " --tls-key /etc/elastickv/n3.key")
@click.option("--raftId", "--raft-id", "raft_id", required=True, envvar="ELASTICKV_RAFT_ID",
              show_envvar=True, metavar="<id>", help="The stopped node's id.")
@click.option("--raftDataDir", "--raft-data-dir", "data_directory", required=True,
              envvar="ELASTICKV_RAFT_DATA_DIR", show_envvar=True, metavar="<path>",
              type=click.Path(path_type=Path), help="The stopped node's data directory.")
@click.option("--kekFile", "--kek-file", "kek_file", required=True, envvar="ELASTICKV_KEK_FILE",
              show_envvar=True, metavar="<path>", type=click.Path(path_type=Path),
              help="The stopped node's KEK, to check what the leader sends.")
def resync_sidecar(connection: Connection, raft_id: str, data_directory: Path, kek_file: Path,
                   output: str) -> None:
    """Restore the sidecar of a stopped node, on its machine, from the cluster's leader.

    For a sidecar that is lost, damaged or an old copy. A node does this by itself at its start when
    it knows a member that answers. Run it as the node's user, with the node's own certificate.
    """
    from elastickv.cli.resync import resync_stopped_node

    done = resync_stopped_node(connection, parse_node_id(raft_id, "--raftId"), data_directory,
                               kek_file)
    fields = {"from_index": done.before.raft_applied_index if done.before else None,
              "to_index": done.after.raft_applied_index,
              "storage_dek_id": done.after.active_storage, "raft_dek_id": done.after.active_raft,
              "storage_cutover_index": done.after.storage_envelope_cutover_index,
              "raft_cutover_index": done.after.raft_envelope_cutover_index}
    keys = [{"dek_id": dek_id, "purpose": key.purpose.label, "local_epoch": key.local_epoch}
            for dek_id, key in sorted(done.after.keys.items())]

    def table() -> None:
        print_fields(fields)
        print_table(keys)

    emit_change({**fields, "keys": keys}, output, "the sidecar was restored", table=table)


@encryption.command("probe-node-id",
                    epilog="\b\nExample:\n  elastickv admin encryption probe-node-id n1 n2 n3")
@click.argument("raft_ids", nargs=-1, required=True)
@output_option
def probe_node_id(raft_ids: tuple[str, ...], output: str) -> int:
    """The node ids that go into nonces, for RAFT_IDS, computed here; exit code 1 if two collide."""
    rows = [{"raft_id": raft_id, "full_node_id": full_node_id(raft_id),
             "full_node_id_hex": f"{full_node_id(raft_id):#018x}",
             "node_id16": node_id16(full_node_id(raft_id))}
            for raft_id in dict.fromkeys(parse_node_id(text, "RAFT_IDS") for text in raft_ids)]
    emit(rows, output)
    collisions = [f"{one['raft_id']} and {other['raft_id']} ({one['node_id16']})"
                  for one, other in itertools.combinations(rows, 2)
                  if one["node_id16"] == other["node_id16"]]
    if collisions:
        click.echo(f"elastickv: {NodeIdCollision.__name__}: the 16-bit node ids of "
                   f"{', '.join(collisions)} are equal. Remedy: choose another --raftId for one "
                   "of them", err=True)
        return int(ExitCode.ERROR)
    return int(ExitCode.OK)


# --- raft ------------------------------------------------------------------------------------


@command(raft, "status", "elastickv admin raft status")
def raft_status(connection: Connection, output: str) -> None:
    """A row per member of the configuration, as each of them tells."""
    rows = connection.run(lambda api: member_rows(connection, api))
    emit(rows, output, table=lambda: print_table(rows))


async def member_rows(connection: Connection, api: Client) -> list[dict[str, object]]:
    """Ask one member for the configuration, then every member for its own state."""
    members = await api.raft.members()
    statuses = await asyncio.gather(*(ask(connection, member) for member in members))
    return [raft_row(member, status)
            for member, status in zip(members, statuses, strict=True)]


async def ask(connection: Connection, member: RaftMember) -> RaftStatus | None:
    """The member's own status; None when it cannot be reached."""
    if not member.client_address:
        return None
    try:
        async with connection.client(member.client_address) as client:
            return await client.raft.status(timeout_s=min(connection.timeout_s, MEMBER_TIMEOUT_S))
    except ElasticKVError:
        return None


def raft_row(member: RaftMember, status: RaftStatus | None) -> dict[str, object]:
    """One line of the status table; None where the member did not tell."""
    return {
        "member": member.node_id,
        "suffrage": member.suffrage,
        "address": member.client_address,
        "raft_address": member.address,
        "role": status.role.name.lower() if status else "unreachable",
        "leader": status.leader_id if status else None,
        "term": status.term if status else None,
        "commit_index": status.commit_index if status else None,
        "applied_index": status.applied_index if status else None,
        "last_log_index": status.last_log_index if status else None,
        "last_snapshot_index": status.last_snapshot_index if status else None,
        "configuration_index": status.configuration_index if status else None,
    }


_PREVIOUS = click.option("--previous-index", default=0, type=_INDEX, metavar="<index>",
                         help="Only if the configuration still stands at this index; 0 = any.")


@command(raft, "add-voter", "elastickv admin raft add-voter n4 10.0.0.4:50151")
@click.argument("node_id")
@click.argument("address")
@_PREVIOUS
def add_voter(connection: Connection, node_id: str, address: str, previous_index: int,
              output: str) -> None:
    """Add NODE_ID at its raft ADDRESS as a voting member."""
    show_index(connection.run(lambda api: api.raft.add_voter(
        node_id, address, previous_index=previous_index)), output)


@command(raft, "add-learner", "elastickv admin raft add-learner n4 10.0.0.4:50151")
@click.argument("node_id")
@click.argument("address")
@_PREVIOUS
def add_learner(connection: Connection, node_id: str, address: str, previous_index: int,
                output: str) -> None:
    """Add NODE_ID at its raft ADDRESS as a member that receives the log and does not vote."""
    show_index(connection.run(lambda api: api.raft.add_learner(
        node_id, address, previous_index=previous_index)), output)


@command(raft, "promote", "elastickv admin raft promote n4")
@click.argument("node_id")
@_PREVIOUS
@click.option("--min-applied-index", default=0, type=_INDEX, metavar="<index>",
              help="Refuse until the learner has applied this index.")
@click.option("--skip-min-applied-check", is_flag=True, help="Promote however far behind it is.")
def promote(connection: Connection, node_id: str, previous_index: int, min_applied_index: int,
            skip_min_applied_check: bool, output: str) -> None:
    """Let the learner NODE_ID vote."""
    show_index(connection.run(lambda api: api.raft.promote_learner(
        node_id, previous_index=previous_index, min_applied_index=min_applied_index,
        skip_min_applied_check=skip_min_applied_check)), output)


@command(raft, "remove", "elastickv admin raft remove n4")
@click.argument("node_id")
@_PREVIOUS
def remove(connection: Connection, node_id: str, previous_index: int, output: str) -> None:
    """Remove NODE_ID, which then stops itself."""
    show_index(connection.run(lambda api: api.raft.remove_server(
        node_id, previous_index=previous_index)), output)


@command(raft, "transfer", "elastickv admin raft transfer n2")
@click.argument("node_id", default="")
def transfer(connection: Connection, node_id: str, output: str) -> None:
    """Hand leadership to NODE_ID, or to the most up-to-date voter."""
    async def work(api: Client) -> RaftStatus | None:
        await api.raft.transfer_leadership(node_id)
        try:
            return await api.raft.status()
        except ElasticKVError as error:
            progress(f"leadership was handed over; who leads now could not be asked: {error}")
            return None

    status = connection.run(work)
    emit_change({"leader": status.leader_id if status else None,
                 "term": status.term if status else None}, output, "leadership was handed over")


def show_index(index: int, output: str) -> None:
    """The log index of a configuration."""
    emit_change({"configuration_index": index}, output,
                f"the change was applied at index {index}")
