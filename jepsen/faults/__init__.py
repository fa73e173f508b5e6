"""What goes wrong: packages of faults, and one table of them all.

A package is a class with the interface of `api.Fault`. To add one, write it and enter it below; the
command line, `FAULTS=all`, the documentation's list and the report take it from there.
"""

from jepsen.faults.api import Fault, NotAvailable, NotNow, Requirements, Violation
from jepsen.faults.crashes import KillAll, KillMinority, KillOne, Pause
from jepsen.faults.disks import DiskFull, IoError, OldDisk, Wipe
from jepsen.faults.encryption import (
    Bootstrap,
    Cutovers,
    Resync,
    RotateRaft,
    RotateStorage,
    WrongKek,
)
from jepsen.faults.membership import Membership, Transfer
from jepsen.faults.network import (
    IsolateLeader,
    Lossy,
    Narrow,
    OneWay,
    PartitionHalves,
    Ring,
    Slow,
)
from jepsen.faults.time import ClockSteps

FAULTS: dict[str, type[Fault]] = {fault.name: fault for fault in (
    KillOne, KillMinority, KillAll, Pause,
    PartitionHalves, OneWay, Ring, IsolateLeader, Slow, Lossy, Narrow,
    ClockSteps, DiskFull, IoError, Wipe, OldDisk,
    Membership, Transfer,
    Bootstrap, Cutovers, RotateStorage, RotateRaft, Resync, WrongKek,
)}

__all__ = ["FAULTS", "Fault", "NotAvailable", "NotNow", "Requirements", "Violation"]
