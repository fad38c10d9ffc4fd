"""Between hosts: the interface, every pair of them, their clocks, the ring, and Horovod's own allreduce."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from horovod_owt.errors import RunError
from horovod_owt.parallel.device import Device
from horovod_owt.parallel.interfaces import address_of, interface_between
from horovod_owt.preflight import wire
from horovod_owt.preflight.findings import Answer, Finding, differing, grouped, hosts_of, who
from horovod_owt.preflight.wire import Pair

CLOCK_LIMIT_S = 1.0  # logs of hosts that differ by more are no help; munge and NFS mind more than that
LATENCY_FLOOR_S = 5e-4  # no latency below this is worth a word
RING_SHARE = 0.1  # of what plain TCP moves round the ring: less is another network, or no cores for it
ALLREDUCE_BYTES = 32 << 20
ALLREDUCE_S = 1.0  # for about how long it is repeated

Pairs = Mapping[tuple[str, str], Pair]


def interface(table: Mapping[str, Sequence[str]], net: Path = Path("/sys/class/net")) -> dict[str, Any]:
    """The interface by which this host reaches all of `table`; raises ConfigError where there is no such one.

    Names decide, as they do for launchers; one that leads nowhere is spoken of elsewhere, and its host's
    first address stands in.
    """
    name = interface_between([host if _resolves(host) else addresses[0] for host, addresses in table.items()])
    return {
        "name": name,
        "address": address_of(name),
        "mtu": _number(net / name / "mtu"),
        "mbit_per_s": _number(net / name / "speed"),
    }


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, socket.AF_INET)
    except OSError:
        return False
    return True


def _number(file: Path) -> int | None:
    """None where the driver knows none, or says -1."""
    try:
        return max(0, int(file.read_text())) or None
    except (OSError, ValueError):
        return None


def judge_interfaces(answers: Sequence[Answer]) -> list[Finding]:
    """One that leads from host to host, alike everywhere."""
    names = ", ".join(sorted({a.value["name"] for a in answers}))
    if len(answers) == 1:
        return [Finding("interface", True, f"{names}: all ranks are on this host")]
    findings = []
    odd = [a for a in answers if a.value["name"] == "lo" or a.value["name"].startswith(("docker", "virbr"))]
    if odd:
        fix = "names of hosts that lead to their addresses on the common network; --interface NAME"
        saw = ", ".join(f"{a.value['name']} on {a.host}" for a in odd)
        findings.append(Finding("interface", False, saw, "one that leads to other hosts", fix, hosts_of(odd)))
    for key, what, unit in (("mtu", "mtu", "bytes"), ("mbit_per_s", "speed", "Mbit/s")):
        groups = grouped(answers, lambda value, key=key, unit=unit: f"{value[key] or 'unknown'} {unit}")
        if len(groups) > 1:
            saw, hosts = differing(groups)
            fix = "`ip link`, `ethtool`; the switch"
            findings.append(Finding(f"interface: {what}", False, saw, "the same on every host", fix, hosts))
    return findings or [Finding("interface", True, f"{names} on {len(answers)} hosts")]


def rounds(hosts: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Every pair once, in rounds in which each host is in one pair at most (the circle method)."""
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
    """Those below half the usual bandwidth in one direction, or beyond twice the usual latency.

    Usual is the median over hosts of each one's best: a host whose every link is slow, one of three, would
    make the median over pairs its own.
    """
    if not pairs:
        return []
    rate, latency_s = _usual(pairs)
    return [
        pair
        for pair, found in pairs.items()
        if min(found.up_bytes_per_s, found.down_bytes_per_s) < rate / 2
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


def measure(peer: str, place: Sequence[Any]) -> tuple[str, dict[str, float]]:
    """This host's pair with `peer`, who answers at `place` (address, port), as a name and plain numbers."""
    try:
        return peer, asdict(wire.measure(*place))
    except OSError as error:
        raise RunError(
            f"{peer} is not reached at {place[0]}: {error}",
            wanted="TCP between all hosts, on any port",
            fix="the firewall; `ip route get ADDRESS`",
        ) from None


def better(one: Pair | None, other: Pair) -> Pair:
    """The best of two measurements, each number by itself: other work on a link only ever makes it worse."""
    if one is None:
        return other
    return Pair(
        min(one.latency_s, other.latency_s),
        max(one.up_bytes_per_s, other.up_bytes_per_s),
        max(one.down_bytes_per_s, other.down_bytes_per_s),
    )


def judge_pairs(pairs: Pairs, of: int) -> list[Finding]:
    """Those measured, `of` so many that there are, are about as fast as each other."""
    findings = []
    rate, latency_s = _usual(pairs)
    usual = f"usual are {rate / 1e9:.3g} GB/s and {1e6 * latency_s:.0f} us"
    for a, b in slow_pairs(pairs):
        found = pairs[a, b]
        saw = (
            f"{a} to {b} {found.up_bytes_per_s / 1e9:.3g} GB/s, back {found.down_bytes_per_s / 1e9:.3g}, "
            f"{1e6 * found.latency_s:.0f} us; {usual}"
        )
        wanted = "half of the usual bandwidth, at most twice the latency"
        fix = "`ethtool` and the error counters of `ip -s link` on both; cable, port, a shaped queue"
        findings.append(Finding("pairs", False, saw, wanted, fix, (a, b)))
    if not findings:
        some = f"{len(pairs)} of {of} pairs" if len(pairs) < of else f"{of} pair{'s'[: of > 1]}"
        slowest = min(min(p.up_bytes_per_s, p.down_bytes_per_s) for p in pairs.values())
        slow = f"slowest {slowest / 1e9:.3g} GB/s, {1e6 * max(p.latency_s for p in pairs.values()):.0f} us"
        findings.append(Finding("pairs", True, f"{some} of hosts; {usual}; {slow}"))
    return findings


def judge_clocks(answers: Sequence[Answer], root: str) -> list[Finding]:
    """All clocks are where that of rank 0's host is; each answer's value is that one minus the host's own."""
    off = [a for a in answers if abs(a.value) > CLOCK_LIMIT_S]
    furthest = sorted(off or answers, key=lambda a: -abs(a.value))
    shown = furthest[:4] if off else furthest[:1]
    saw = ", ".join(f"{a.host} {-a.value:+.2g} s" for a in shown) + f" against {root}"
    saw += f", the furthest of {len(answers)}" if not off and answers[1:] else ""
    fix = "`timedatectl`; chrony or ntp" if off else ""
    return [Finding("clocks", not off, saw, f"within {CLOCK_LIMIT_S:g} s", fix, hosts_of(off))]


def judge_ring(answers: Sequence[Answer], seconds: Sequence[Answer]) -> Finding:
    """Horovod's allreduce reaches a fair part of what plain TCP moves round the same ring.

    `answers` are what each rank received a second; `seconds`, how long an allreduce took each. Its bus
    bandwidth is as nccl-tests defines it: 2 (n-1)/n of the bytes by the time.
    """
    ranks = len(answers)
    slowest = min(answers, key=lambda answer: answer.value)
    busbw = 2 * (ranks - 1) / ranks * ALLREDUCE_BYTES / max(answer.value for answer in seconds)
    ok = busbw >= RING_SHARE * slowest.value
    return Finding(
        "allreduce",
        ok,
        f"{busbw / 1e9:.3g} GB/s on the bus for {ALLREDUCE_BYTES >> 20} MB over {ranks} ranks; "
        f"plain TCP round the ring moves {slowest.value / 1e9:.3g}, slowest into {who([slowest])}",
        f"at least {100 * RING_SHARE:.0f} % of plain TCP",
        "" if ok else "the right interface? HOROVOD_GLOO_IFACE, NCCL_SOCKET_IFNAME; a core for each rank?",
        hosts_of([slowest]) if not ok else (),
    )


def allreduce_seconds(device: Device) -> float:
    """The median time of an allreduce, as this rank sees it. Every rank must call it; starts Horovod."""
    import torch

    from horovod_owt.parallel import runtime
    from horovod_owt.parallel.collectives import sum_over_ranks

    world = runtime.init(device)
    values = torch.ones(ALLREDUCE_BYTES // 4, device=world.device)

    def once() -> float:
        start = perf_counter()
        sum_over_ranks(values, "preflight")[:1].item()  # on a GPU, this waits for the result
        return perf_counter() - start

    once()
    slowest = sum_over_ranks(torch.tensor([once()]), "preflight.slowest").item() / world.size
    times = [once() for _ in range(max(3, min(20, int(ALLREDUCE_S / slowest))))]  # as many on every rank
    runtime.shutdown()
    return median(times)
