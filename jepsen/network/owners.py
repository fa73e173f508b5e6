"""Which process holds the other end of a TCP connection over loopback, from /proc.

A proxy that listens at one address per node cannot tell from the connection who dialled. The
kernel can: /proc/net/tcp gives the inode of the socket at the dialler's port, and each process
lists its sockets by inode. Needs no privilege for processes of the same user.

    /proc/net/tcp   sl  local_address rem_address ... uid timeout inode
                     0: 0100007F:C3A2 0100007F:1F90 ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

_LOOPBACK = f"{int.from_bytes(bytes((127, 0, 0, 1)), sys.byteorder):08X}"
"""127.0.0.1 as the kernel prints it: one number in the byte order of the machine."""

_LOCAL, _REMOTE, _INODE = 1, 2, 9
_TABLE = Path("/proc/net/tcp")


def socket_inode(table: Iterable[str], local_port: int, remote_port: int) -> str:
    """The inode of the connection from `local_port` to `remote_port`; "" when there is none."""
    local = f"{_LOOPBACK}:{local_port:04X}"
    remote = f"{_LOOPBACK}:{remote_port:04X}"
    for line in table:
        fields = line.split()
        if len(fields) > _INODE and fields[_LOCAL] == local and fields[_REMOTE] == remote:
            return fields[_INODE]
    return ""


def holds_socket(pid: int, inode: str) -> bool:
    """Whether the process has that socket open; False when it has ended."""
    descriptors = f"/proc/{pid}/fd"
    wanted = f"socket:[{inode}]"
    try:
        names = os.listdir(descriptors)
    except OSError:
        return False
    for name in names:
        try:
            if os.readlink(f"{descriptors}/{name}") == wanted:
                return True
        except OSError:
            continue
    return False


def dialler(pids: Mapping[str, int], local_port: int, remote_port: int) -> str | None:
    """The key in `pids` whose process dialled from `local_port` to `remote_port` of loopback; None
    when none of them did, or it has hung up already."""
    with _TABLE.open(encoding="ascii") as table:
        inode = socket_inode(table, local_port, remote_port)
    if not inode or inode == "0":
        return None
    return next((name for name, pid in pids.items() if holds_socket(pid, inode)), None)
