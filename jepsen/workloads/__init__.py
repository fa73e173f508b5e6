"""What the clients do: one module per workload, one table of them all."""

from jepsen.workloads.api import Session, Workload
from jepsen.workloads.append import AppendWorkload
from jepsen.workloads.bank import BankWorkload
from jepsen.workloads.register import RegisterWorkload
from jepsen.workloads.scans import ScansWorkload
from jepsen.workloads.unique import UniqueWorkload

WORKLOADS: dict[str, type[Workload]] = {
    "register": RegisterWorkload,
    "append": AppendWorkload,
    "bank": BankWorkload,
    "unique": UniqueWorkload,
    "scans": ScansWorkload,
}

__all__ = ["WORKLOADS", "Session", "Workload"]
