"""The sequence of a preflight: probes on every rank, judged on rank 0."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from horovod_owt.parallel.admission import Listener, new_key
from horovod_owt.parallel.control_channel import open_control_channel
from horovod_owt.parallel.device import Device, claim_device
from horovod_owt.parallel.interfaces import own_addresses
from horovod_owt.preflight import dataset, device, host, network, wire
from horovod_owt.preflight.findings import Finding
from horovod_owt.preflight.inquiry import Inquiry, within
from horovod_owt.topology import Topology

START_S = 45.0  # for ranks to start
LOAD_S = 60.0  # to load torch and Horovod from a cold file system
LOCAL_S = 10.0  # for probes that use only the local host
RESOLVE_S = 25.0  # a resolver tries each server twice for 5 s
DATA_S = 60.0  # to list a data set of millions of files over a network
NETWORK_S = 30.0
MAX_ROUNDS = 24  # of pairs: about 25 s


def preflight(
    topology: Topology, data: Path | None, run_dir: Path, tell: Callable[[list[Finding]], None]
) -> int:
    """Run all checks; `tell` gets the findings on rank 0. Returns the number of bad ones, on every rank.

    Every rank must call it. Raises RunError on a rank that loses rank 0.
    """
    with open_control_channel(topology, limit_s=START_S) as channel:
        inquiry = Inquiry(channel, topology)
        claimed: list[Device] = []

        def look_at_device() -> dict[str, Any]:
            claimed.append(claim_device(topology))  # before torch starts CUDA
            return device.look(claimed[0])

        inquiry.check("devices", look_at_device, device.judge, LOAD_S)
        inquiry.check("versions", host.environment, host.judge_environment, LOAD_S)
        inquiry.check(
            "limits",
            lambda: host.limits(topology),
            lambda answers: host.judge_limits(answers, topology.world_size),
            LOCAL_S,
        )
        if data is not None:
            inquiry.check(
                "data",
                lambda: dataset.read(data, topology.rank),
                dataset.judge_data,
                DATA_S,
                each_host=True,
            )
        check_folder(inquiry, run_dir)
        check_network(inquiry, claimed)
        if channel.is_root:
            inquiry.find(*inquiry.attendance())
            tell(inquiry.findings)
        return inquiry.broadcast(sum(not finding.ok for finding in inquiry.findings))


def check_folder(inquiry: Inquiry, run_dir: Path) -> None:
    token, rank = inquiry.broadcast(secrets.token_hex(4)), inquiry.topology.rank
    own = (lambda: dataset.leave_token(run_dir, token)) if rank == 0 else None
    inquiry.ask("run folder of rank 0", own, LOCAL_S)
    try:
        seen = lambda: dataset.try_folder(run_dir, token, rank)  # noqa: E731
        inquiry.check("run folder", seen, dataset.judge_folder, LOCAL_S, each_host=True)
    finally:
        if rank == 0:
            within(LOCAL_S, lambda: dataset.take_token(run_dir, token))


def check_network(inquiry: Inquiry, claimed: list[Device]) -> None:
    """Names and interfaces first, because the measurements use them."""
    found = inquiry.check("addresses", own_addresses, host.judge_addresses, LOCAL_S, each_host=True)
    table = inquiry.broadcast({answer.host: answer.value for answer in found})
    names = lambda: host.names(table, inquiry.topology.host)  # noqa: E731
    inquiry.check("host names", names, host.judge_names, RESOLVE_S, each_host=True)
    interfaces = inquiry.check(
        "interface", lambda: network.interface(table), network.judge_interfaces, RESOLVE_S, each_host=True
    )
    addresses = inquiry.broadcast({answer.host: answer.value["address"] for answer in interfaces})
    if inquiry.topology.world_size == 1:
        return
    address, key = addresses.get(inquiry.topology.host), inquiry.broadcast(new_key())
    with ExitStack() as stack:
        port = (lambda: stack.enter_context(wire.answering(address, key))) if address else None
        ports = inquiry.ask("open ports", port, LOCAL_S, each_host=True)
        where = inquiry.broadcast({answer.host: [addresses[answer.host], answer.value] for answer in ports})
        check_clocks(inquiry, where, key)
        check_pairs(inquiry, where, key)
    check_ring(inquiry, address, key, claimed)


def check_clocks(inquiry: Inquiry, where: dict[str, list], key: str) -> None:
    root = inquiry.broadcast(inquiry.topology.host)
    other = root in where and inquiry.topology.host != root
    offset = (lambda: wire.ping(*where[root], key)[1]) if other else None
    judge = functools.partial(network.judge_clocks, root=root)
    inquiry.check("clocks", offset, judge, NETWORK_S, each_host=True)


def check_pairs(inquiry: Inquiry, where: dict[str, list], key: str) -> None:
    """Measure in rounds, each host in one pair at a time; slow pairs are measured twice more."""
    rounds = list(network.rounds(sorted(where)))
    rounds = rounds[:: max(1, -(-len(rounds) // MAX_ROUNDS))]
    pairs: dict[tuple[str, str], wire.Pair] = {}

    def measure(round_: Sequence[tuple[str, str]]) -> None:
        peer = dict(round_).get(inquiry.topology.host)
        probe = functools.partial(network.measure, peer, where[peer], key) if peer else None
        for answer in inquiry.ask("pairs", probe, NETWORK_S, each_host=True):
            other, found = answer.value
            pair = answer.host, other
            pairs[pair] = network.better(pairs.get(pair), wire.Pair(**found))
        inquiry.broadcast()  # a barrier between rounds

    for round_ in rounds:
        measure(round_)
    for _ in range(2):
        slow = {tuple(pair) for pair in inquiry.broadcast(network.slow_pairs(pairs))}
        for round_ in rounds:
            if again := slow.intersection(round_):
                measure(sorted(again))
    if pairs:
        inquiry.find(*network.judge_pairs(pairs, len(where) * (len(where) - 1) // 2))


def check_ring(inquiry: Inquiry, address: str | None, key: str, claimed: list[Device]) -> None:
    """All ranks at once, by plain TCP, then by Horovod; only if every rank is ready for it."""
    rank, size = inquiry.topology.rank, inquiry.topology.world_size
    with Listener([address] if address else [], key) as listener:
        place = listener.endpoints[0] if address and claimed else None
        places = inquiry.ask("ring addresses", lambda: place, LOCAL_S)
        ring = [answer.value for answer in places if answer.value]
        ring = inquiry.broadcast(ring if len(ring) == size else [])
        if not ring:
            saw = "not measured: a rank without an answer, an interface or a device"
            inquiry.find(Finding("allreduce", False, saw, "every rank ready", "fix the other findings first"))
            return
        following = tuple(ring[(rank + 1) % size])
        moved = inquiry.ask("ring of plain TCP", lambda: wire.ring_rate(listener, following), NETWORK_S)
    reduced = inquiry.ask("allreduce", lambda: network.allreduce_seconds(claimed[0]), NETWORK_S)
    if len(moved) == len(reduced) == size:
        inquiry.find(network.judge_ring(moved, reduced))
