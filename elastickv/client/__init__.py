"""The client library.

    from elastickv.client import SyncClient, TlsFiles

    with SyncClient(["127.0.0.1:50051", "127.0.0.1:50052"],
                    tls=TlsFiles(ca=Path(...), cert=Path(...), key=Path(...))) as client:
        client.put(b"greeting", b"hello")
        client.get(b"greeting").value

`Client` is the same for asyncio. Errors are those of `elastickv.errors`.
"""

from elastickv.client.aio import Client, EncryptionCalls, RaftCalls
from elastickv.client.model import (
    BootstrapResult,
    Capability,
    Condition,
    CutoverResult,
    DekStatus,
    Delete,
    MemberEncryption,
    Pair,
    Purpose,
    Put,
    RaftMember,
    RaftStatus,
    ReadResult,
    Role,
    RotateResult,
    SidecarState,
    Writer,
    WriteResult,
)
from elastickv.client.sync import SyncClient, SyncEncryptionCalls, SyncRaftCalls
from elastickv.config import TlsFiles

__all__ = [
    "BootstrapResult", "Capability", "Client", "Condition", "CutoverResult", "DekStatus", "Delete",
    "EncryptionCalls", "MemberEncryption", "Pair", "Purpose", "Put", "RaftCalls", "RaftMember",
    "RaftStatus", "ReadResult", "Role", "RotateResult", "SidecarState", "SyncClient",
    "SyncEncryptionCalls", "SyncRaftCalls", "TlsFiles", "WriteResult", "Writer",
]
