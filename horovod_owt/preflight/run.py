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
from horovod_owt.preflight.probes import Probes, within
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
        probes = Probes(channel, topology)
        claimed: list[Device] = []

        def look_at_device() -> dict[str, Any]:
            claimed.append(claim_device(topology))  # before torch starts CUDA
            return device.look(claimed[0])

        probes.check("devices", look_at_device, device.judge, LOAD_S)
        probes.check("versions", host.environment, host.judge_environment, LOAD_S)
        probes.check(
            "limits",
            lambda: host.limits(topology),
            lambda answers: host.judge_limits(answers, topology.world_size),
            LOCAL_S,
        )
        if data is not None:
            probes.check(
                "data",
                lambda: dataset.read(data, topology.rank),
                dataset.judge_data,
                DATA_S,
                each_host=True,
            )
        check_folder(probes, run_dir)
        check_network(probes, claimed)
        if channel.is_root:
            probes.report(*probes.judge_attendance())
            tell(probes.findings)
        return probes.broadcast(sum(not finding.ok for finding in probes.findings))


def check_folder(probes: Probes, run_dir: Path) -> None:
    token, rank = probes.broadcast(secrets.token_hex(4)), probes.topology.rank
    own = (lambda: dataset.leave_token(run_dir, token)) if rank == 0 else None
    probes.gather("run folder of rank 0", own, LOCAL_S)
    try:
        seen = lambda: dataset.try_folder(run_dir, token, rank)  # noqa: E731
        probes.check("run folder", seen, dataset.judge_folder, LOCAL_S, each_host=True)
    finally:
        if rank == 0:
            within(LOCAL_S, lambda: dataset.take_token(run_dir, token))


def check_network(probes: Probes, claimed: list[Device]) -> None:
    """Check names and interfaces, and then the network between hosts, which depends on them."""
    found = probes.check("addresses", own_addresses, host.judge_addresses, LOCAL_S, each_host=True)
    table = probes.broadcast({answer.host: answer.value for answer in found})
    names = lambda: host.names(table, probes.topology.host)  # noqa: E731
    probes.check("host names", names, host.judge_names, RESOLVE_S, each_host=True)
    interfaces = probes.check(
        "interface", lambda: network.interface(table), network.judge_interfaces, RESOLVE_S, each_host=True
    )
    addresses = probes.broadcast({answer.host: answer.value["address"] for answer in interfaces})
    if probes.topology.world_size == 1:
        return
    address, key = addresses.get(probes.topology.host), probes.broadcast(new_key())
    with ExitStack() as stack:
        port = (lambda: stack.enter_context(wire.answering(address, key))) if address else None
        ports = probes.gather("open ports", port, LOCAL_S, each_host=True)
        where = probes.broadcast({answer.host: [addresses[answer.host], answer.value] for answer in ports})
        check_clocks(probes, where, key)
        check_pairs(probes, where, key)
    check_ring(probes, address, key, claimed)


def check_clocks(probes: Probes, where: dict[str, list], key: str) -> None:
    root = probes.broadcast(probes.topology.host)
    other = root in where and probes.topology.host != root
    offset = (lambda: wire.ping(*where[root], key)[1]) if other else None
    judge = functools.partial(network.judge_clocks, root=root)
    probes.check("clocks", offset, judge, NETWORK_S, each_host=True)


def check_pairs(probes: Probes, where: dict[str, list], key: str) -> None:
    """Measure pairs in rounds, each host in one pair at a time; measure slow pairs twice more."""
    rounds = list(network.rounds(sorted(where)))
    rounds = rounds[:: max(1, -(-len(rounds) // MAX_ROUNDS))]
    pairs: dict[tuple[str, str], wire.Pair] = {}

    def measure(round_: Sequence[tuple[str, str]]) -> None:
        peer = dict(round_).get(probes.topology.host)
        probe = functools.partial(network.measure, peer, where[peer], key) if peer else None
        for answer in probes.gather("pairs", probe, NETWORK_S, each_host=True):
            other, found = answer.value
            pair = answer.host, other
            pairs[pair] = network.better(pairs.get(pair), wire.Pair(**found))
        probes.broadcast()  # a barrier between rounds

    for round_ in rounds:
        measure(round_)
    for _ in range(2):
        slow = {tuple(pair) for pair in probes.broadcast(network.slow_pairs(pairs))}
        for round_ in rounds:
            if again := slow.intersection(round_):
                measure(sorted(again))
    if pairs:
        probes.report(*network.judge_pairs(pairs, len(where) * (len(where) - 1) // 2))


def check_ring(probes: Probes, address: str | None, key: str, claimed: list[Device]) -> None:
    """Plain TCP around the ring of all ranks at once, then Horovod's allreduce, if every rank is ready."""
    rank, size = probes.topology.rank, probes.topology.world_size
    with Listener([address] if address else [], key) as listener:
        place = listener.endpoints[0] if address and claimed else None
        places = probes.gather("ring addresses", lambda: place, LOCAL_S)
        ring = [answer.value for answer in places if answer.value]
        ring = probes.broadcast(ring if len(ring) == size else [])
        if not ring:
            saw = "not measured: a rank without an answer, an interface or a device"
            fix = "fix the other findings first"
            probes.report(Finding("allreduce", False, saw, "every rank ready", fix))
            return
        following = tuple(ring[(rank + 1) % size])
        moved = probes.gather("ring of plain TCP", lambda: wire.ring_rate(listener, following), NETWORK_S)
    reduced = probes.gather("allreduce", lambda: network.allreduce_seconds(claimed[0]), NETWORK_S)
    if len(moved) == len(reduced) == size:
        probes.report(network.judge_ring(moved, reduced))
