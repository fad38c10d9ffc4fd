"""Checks of the network: interfaces, pairs of hosts, clocks, and an allreduce compared with plain TCP."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from horovod_owt.errors import RunError
from horovod_owt.parallel.device import Device
from horovod_owt.parallel.interfaces import (
    SYSFS_NET,
    address_of,
    chosen_interface,
    interface_of_job,
    link,
)
from horovod_owt.preflight import wire
from horovod_owt.preflight.findings import Answer, Finding, differing, grouped, hosts_of, who
from horovod_owt.preflight.wire import Pair

CLOCK_LIMIT_S = 1.0  # logs with larger offsets are hard to compare; munge and NFS tolerate more
LATENCY_FLOOR_S = 5e-4  # latencies below this are never reported
FAST_BYTES_PER_S = 1.5e9  # nor rates above this: there the cores at both ends limit a single TCP stream
RING_SHARE = 0.1  # of plain TCP around the ring; less indicates the wrong network or too few cores
ALLREDUCE_BYTES = 32 << 20
ALLREDUCE_S = 1.0  # approximate duration of the test

Pairs = Mapping[tuple[str, str], Pair]


def interface(
    table: Mapping[str, Sequence[str]], env: Mapping[str, str] = os.environ, net: Path = SYSFS_NET
) -> dict[str, Any]:
    """The interface set for the job, else the one through which this host reaches all of `table`.

    Raises ConfigError if there is none. Names are resolved, as by launchers; a name that does not resolve is
    reported by another check, and replaced by its host's first address.
    """
    asked = env.get("HOROVOD_GLOO_IFACE") or interface_of_job(env)
    hosts = [host if _resolves(host) else addresses[0] for host, addresses in table.items()]
    name = chosen_interface(asked, hosts)
    return {"name": name, "address": address_of(name), **link(name, net)}


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def judge_interfaces(answers: Sequence[Answer]) -> list[Finding]:
    """Hosts use an interface that reaches the others, with the same MTU and speed."""
    names = ", ".join(sorted({a.value["name"] for a in answers}))
    if len(answers) == 1:
        return [Finding("interface", True, f"{names}: all ranks are on this host")]
    findings = []
    odd = [a for a in answers if a.value["name"] == "lo" or a.value["name"].startswith(("docker", "virbr"))]
    if odd:
        fix = "let host names resolve to addresses on the common network, or pass --interface NAME"
        saw = ", ".join(f"{a.value['name']} on {a.host}" for a in odd)
        findings.append(Finding("interface", False, saw, "one that reaches all hosts", fix, hosts_of(odd)))
    for key, what, unit in (("mtu", "mtu", "bytes"), ("mbit_per_s", "speed", "Mbit/s")):
        groups = grouped(answers, lambda value, key=key, unit=unit: f"{value[key] or 'unknown'} {unit}")
        if len(groups) > 1:
            saw, hosts = differing(groups)
            fix = "check `ip link`, `ethtool` and the switch"
            findings.append(Finding(f"interface: {what}", False, saw, "the same on every host", fix, hosts))
    return findings or [Finding("interface", True, f"{names} on {len(answers)} hosts")]


def rounds(hosts: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Every pair once, in rounds in which each host is in at most one pair (the circle method)."""
    seats: list[str | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        yield [
            (a, b)
            for a, b in zip(seats[:half], reversed(seats[half:]), strict=True)
            if a is not None and b is not None
        ]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def slow_pairs(pairs: Pairs) -> list[tuple[str, str]]:
    """Pairs with less than half the usual bandwidth in one direction, or more than twice the usual latency.

    "Usual" is the median over hosts of each host's best pair; with only three hosts, a median over pairs
    would be dominated by a slow host. A pair faster than FAST_BYTES_PER_S is not slow.
    """
    if not pairs:
        return []
    rate, latency_s = _usual(pairs)
    return [
        pair
        for pair, found in pairs.items()
        if min(found.up_bytes_per_s, found.down_bytes_per_s) < min(rate / 2, FAST_BYTES_PER_S)
        or found.latency_s > max(2 * latency_s, LATENCY_FLOOR_S)
    ]


def _usual(pairs: Pairs) -> tuple[float, float]:
    hosts = {host for pair in pairs for host in pair}
    rates, latencies_s = [], []
    for host in hosts:
        own = [found for pair, found in pairs.items() if host in pair]
        rates.append(max(max(found.up_bytes_per_s, found.down_bytes_per_s) for found in own))
        latencies_s.append(min(found.latency_s for found in own))
    return median(rates), median(latencies_s)


def measure(peer: str, place: Sequence[Any], key: str) -> tuple[str, dict[str, float]]:
    """Measure the pair of this host and `peer`, which listens at `place` (address, port)."""
    try:
        return peer, asdict(wire.measure(*place, key))
    except OSError as error:
        raise RunError(
            f"{peer} is not reachable at {place[0]}: {error}",
            wanted="TCP between all hosts, on any port",
            fix="check the firewall and `ip route get ADDRESS`",
        ) from None


def better(one: Pair | None, other: Pair) -> Pair:
    """The better of two measurements, number by number: other traffic can only make them worse."""
    if one is None:
        return other
    return Pair(
        min(one.latency_s, other.latency_s),
        max(one.up_bytes_per_s, other.up_bytes_per_s),
        max(one.down_bytes_per_s, other.down_bytes_per_s),
    )


def judge_pairs(pairs: Pairs, of: int) -> list[Finding]:
    """The measured pairs, out of `of`, have similar bandwidth and latency."""
    findings = []
    rate, latency_s = _usual(pairs)
    usual = f"usual: {rate / 1e9:.3g} GB/s and {1e6 * latency_s:.0f} us"
    for a, b in slow_pairs(pairs):
        found = pairs[a, b]
        saw = (
            f"{a} to {b} {found.up_bytes_per_s / 1e9:.3g} GB/s, back {found.down_bytes_per_s / 1e9:.3g}, "
            f"{1e6 * found.latency_s:.0f} us; {usual}"
        )
        fast = f"{FAST_BYTES_PER_S / 1e9} GB/s"
        wanted = f"at least half the usual bandwidth or {fast}, at most twice the latency"
        fix = "check `ethtool` and the errors in `ip -s link` on both; cable, port, traffic shaping"
        findings.append(Finding("pairs", False, saw, wanted, fix, (a, b)))
    if not findings:
        some = f"{len(pairs)} of {of} pairs" if len(pairs) < of else f"{of} pair{'s'[: of > 1]}"
        slowest = min(min(p.up_bytes_per_s, p.down_bytes_per_s) for p in pairs.values())
        slow = f"slowest {slowest / 1e9:.3g} GB/s, {1e6 * max(p.latency_s for p in pairs.values()):.0f} us"
        findings.append(Finding("pairs", True, f"{some} of hosts; {usual}; {slow}"))
    return findings


def judge_clocks(answers: Sequence[Answer], root: str) -> list[Finding]:
    """Clocks agree with rank 0's host; each answer's value is that host's clock minus its own."""
    off = [a for a in answers if abs(a.value) > CLOCK_LIMIT_S]
    furthest = sorted(off or answers, key=lambda a: -abs(a.value))
    shown = furthest[:4] if off else furthest[:1]
    saw = ", ".join(f"{a.host} {-a.value:+.2g} s" for a in shown) + f" against {root}"
    saw += f", the largest of {len(answers)}" if not off and answers[1:] else ""
    fix = "check `timedatectl`; run chrony or ntp" if off else ""
    return [Finding("clocks", not off, saw, f"within {CLOCK_LIMIT_S:g} s", fix, hosts_of(off))]


def judge_ring(answers: Sequence[Answer], seconds: Sequence[Answer]) -> Finding:
    """Horovod's allreduce reaches RING_SHARE of the bandwidth of plain TCP around the same ring.

    `answers` are the bytes per second that each rank received, `seconds` the time of an allreduce on each.
    Bus bandwidth is defined as in nccl-tests: 2 (n-1)/n of the bytes, divided by the time.
    """
    ranks = len(answers)
    slowest = min(answers, key=lambda answer: answer.value)
    busbw = 2 * (ranks - 1) / ranks * ALLREDUCE_BYTES / max(answer.value for answer in seconds)
    ok = busbw >= RING_SHARE * slowest.value
    return Finding(
        "allreduce",
        ok,
        f"bus bandwidth {busbw / 1e9:.3g} GB/s for {ALLREDUCE_BYTES >> 20} MB over {ranks} ranks; "
        f"plain TCP around the ring {slowest.value / 1e9:.3g} GB/s, slowest into {who([slowest])}",
        f"at least {100 * RING_SHARE:.0f} % of plain TCP",
        "" if ok else "check the interface (HOROVOD_GLOO_IFACE, NCCL_SOCKET_IFNAME) and a core for each rank",
        hosts_of([slowest]) if not ok else (),
    )


def allreduce_seconds(device: Device) -> float:
    """The median time of an allreduce on this rank. Starts Horovod; every rank must call it."""
    import torch

    from horovod_owt.parallel import runtime
    from horovod_owt.parallel.collectives import sum_over_ranks

    world = runtime.init(device)
    values = torch.ones(ALLREDUCE_BYTES // 4, device=world.device)

    def once() -> float:
        start = perf_counter()
        sum_over_ranks(values, "preflight")[:1].item()  # waits for the result on a GPU
        return perf_counter() - start

    once()
    slowest = sum_over_ranks(torch.tensor([once()]), "preflight.slowest").item() / world.size
    times = [once() for _ in range(max(3, min(20, int(ALLREDUCE_S / slowest))))]  # equal on all ranks
    runtime.shutdown()
    return median(times)
