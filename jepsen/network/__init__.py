"""The network between nodes, and how it is broken.

Two drivers, one interface: `namespaces` gives each node a network namespace of its own, where the
machine allows it; `proxy` puts a userspace TCP proxy into every link, which needs no privilege.
Only traffic between members is affected: clients always reach every node.
"""

from jepsen.network.api import CLEAN, Link, LinkShape, Network, Unsupported, links_between

__all__ = ["CLEAN", "Link", "LinkShape", "Network", "Unsupported", "links_between"]
