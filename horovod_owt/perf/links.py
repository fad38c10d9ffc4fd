"""Seconds of collectives by the alpha-beta model: a latency per message, and bytes over a bandwidth.

In a ring allreduce over n ranks, each sends 2 (n-1) messages and 2 (n-1)/n of the buffer (Patarasuk and Yuan
2009). Ranks are numbered host by host, so a ring over several nodes crosses each node's network adapter once.
The two-level ring reduces inside each node, then each local rank reduces its share between nodes, then
gathers.
"""

from __future__ import annotations

from dataclasses import dataclass

from horovod_owt.perf.predict import Sum


@dataclass(frozen=True)
class Links:
    """How the ranks of a job are connected; GB are 1e9 bytes, in one direction."""

    ranks_per_node: int
    link_gb_s: float  # a rank's to its neighbour in the node
    link_us: float  # latency of a message
    net_gb_s: float  # of a node's network adapters together
    net_us: float
    core_gb_s: float = 0.0  # of collectives on a CPU rank's own cores; 0: they take none

    def allreduce(self, buffer_bytes: float, ranks: int, *, rings: int = 1, two_level: bool = False) -> Sum:
        """Sum a buffer over `ranks` ranks, which are on several nodes if they are more than a node's.

        `rings` such sums run at the same time over different ranks of the same nodes (as for weight shards),
        so a node has ranks_per_node / rings ranks of each ring.
        """
        if ranks == 1:
            return Sum()
        sent = 2 * (ranks - 1) / ranks * buffer_bytes
        nodes = self._nodes(ranks * rings)
        if nodes == 1:
            wire_s = self._link_s(2 * (ranks - 1), sent)
        elif two_level and rings == 1 and self.ranks_per_node > 1:
            g = self.ranks_per_node
            between = 2 * (nodes - 1) / nodes * buffer_bytes  # of all local ranks together
            inside = 2 * (g - 1) / g * buffer_bytes
            wire_s = self._link_s(2 * (g - 1), inside) + self._net_s(2 * (nodes - 1), between)
        else:
            # every step of the ring waits for its slowest hop, which is one between nodes
            crossing = sent * min(rings, self.ranks_per_node)
            wire_s = max(self._net_s(2 * (ranks - 1), crossing), self._link_s(0, sent))
        return Sum(busy_s=self._core_s(sent), wire_s=wire_s)

    def exchange(self, sent_bytes: float, messages: int, group_size: int) -> Sum:
        """A rank of an fc_group sends `sent_bytes` to its peers, in `messages` messages one after another."""
        if group_size == 1:
            return Sum()
        away = max(0, group_size - self.ranks_per_node)  # peers on other nodes
        outside = sent_bytes * away / (group_size - 1)
        wire_s = self._link_s(messages, sent_bytes - outside)
        if away:
            wire_s = max(wire_s, self._net_s(messages, outside * self.ranks_per_node))
        return Sum(busy_s=self._core_s(sent_bytes), wire_s=wire_s)

    def _nodes(self, ranks: int) -> int:
        return -(-ranks // self.ranks_per_node)

    def _link_s(self, messages: int, sent_bytes: float) -> float:
        return 1e-6 * self.link_us * messages + sent_bytes / (1e9 * self.link_gb_s)

    def _net_s(self, messages: int, sent_bytes: float) -> float:
        return 1e-6 * self.net_us * messages + sent_bytes / (1e9 * self.net_gb_s)

    def _core_s(self, sent_bytes: float) -> float:
        return sent_bytes / (1e9 * self.core_gb_s) if self.core_gb_s else 0.0
