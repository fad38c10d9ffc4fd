"""One preflight: every rank is asked in turn about everything, and rank 0 judges what they say."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from horovod_owt.errors import OwtError
from horovod_owt.parallel.device import Device, claim_device
from horovod_owt.parallel.door import own_addresses
from horovod_owt.parallel.meeting import Meeting, meet
from horovod_owt.preflight import dataset, device, host, network, wire
from horovod_owt.preflight.findings import Answer, Finding, hosts_of, spans, who
from horovod_owt.topology import Topology

log = logging.getLogger(__name__)

COME_S = 45.0  # for ranks to start
LOAD_S = 60.0  # to load torch and Horovod from a cold file system
LOOK_S = 10.0  # to look at what is on the host
RESOLVE_S = 25.0  # a resolver gives up after 5 s a server, and tries twice
DATA_S = 60.0  # to list a data set of millions of files over a network
NETWORK_S = 30.0
MOST_ROUNDS = 24  # of pairs: some 25 s


class Inquiry:
    """Asks all ranks the same, and keeps the findings; on other ranks than 0 there are never answers."""

    def __init__(self, meeting: Meeting, topology: Topology) -> None:
        self.meeting, self.topology = meeting, topology
        self.findings: list[Finding] = []
        self.hosts = {0: topology.host}  # by rank, of all that have ever answered

    def ask(self, what: str, probe: Callable[[], Any] | None, limit_s: float) -> list[Answer]:
        """What `probe` gave on each rank, in rank order; a rank without one has nothing to say.

        A probe that raises or takes too long is a finding by itself.
        """
        if self.meeting.is_root:
            log.info("preflight: %s", what)
        own = {"host": self.topology.host, **(within(limit_s, probe) if probe else {})}
        said = self.meeting.gather(own, limit_s, what)
        answers = [Answer(rank, answer["host"], answer) for rank, answer in said.items()]
        self.hosts |= {answer.rank: answer.host for answer in answers}
        self._note_trouble(what, [answer for answer in answers if "error" in answer.value])
        return [Answer(a.rank, a.host, a.value["value"]) for a in answers if "value" in a.value]

    def check(
        self,
        what: str,
        probe: Callable[[], Any] | None,
        judge: Callable[[list[Answer]], list[Finding]],
        limit_s: float,
    ) -> list[Answer]:
        """Ask, and keep what `judge` finds in the answers, if there are any."""
        answers = self.ask(what, probe, limit_s)
        if answers:
            self.find(*judge(answers))
        return answers

    def find(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def share(self, value: Any = None) -> Any:
        return self.meeting.share(value, NETWORK_S)

    def _note_trouble(self, what: str, failed: Sequence[Answer]) -> None:
        by_error: dict[tuple[str, str, str], list[Answer]] = {}
        for answer in failed:
            error = answer.value["error"]
            by_error.setdefault((error["saw"], error["wanted"], error["fix"]), []).append(answer)
        for (saw, wanted, fix), having in by_error.items():
            self.find(Finding(what, False, f"{saw}, on {who(having)}", wanted, fix, hosts_of(having)))


def within(limit_s: float, probe: Callable[[], Any]) -> dict[str, Any]:
    """`{"value": what probe gives}`, or `{"error": {saw, wanted, fix}}` if it raises or is not done in time.

    It runs in a thread that is left behind then: what waits for a dead file server cannot be stopped.
    """
    said: list[dict[str, Any]] = []

    def run() -> None:
        try:
            said.append({"value": probe()})
        except OwtError as error:
            said.append({"error": {"saw": error.saw, "wanted": error.wanted, "fix": error.fix}})
        except Exception as error:
            said.append({"error": {"saw": f"{type(error).__name__}: {error}", "wanted": "", "fix": ""}})

    thread = threading.Thread(target=run, daemon=True, name="probe")
    thread.start()
    thread.join(limit_s)
    return said[0] if said else {"error": {"saw": f"no answer in {limit_s:g} s", "wanted": "", "fix": ""}}


def preflight(
    topology: Topology, data: Path | None, run_dir: Path, tell: Callable[[list[Finding]], None]
) -> int:
    """How many findings are bad, on every rank, once rank 0 has told all findings; every rank must call it.

    Raises RunError on a rank that has no word from rank 0.
    """
    with meet(topology, limit_s=COME_S) as meeting:
        inquiry = Inquiry(meeting, topology)
        leader = topology.local_rank == 0  # speaks for its host
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
            LOOK_S,
        )
        if data is not None:
            read = (lambda: dataset.read(data, topology.rank)) if leader else None
            inquiry.check("data", read, dataset.judge_data, DATA_S)
        check_folder(inquiry, run_dir, leader)
        check_network(inquiry, leader, claimed)
        if meeting.is_root:
            inquiry.find(*attendance(inquiry))
            tell(inquiry.findings)
        return inquiry.share(sum(not finding.ok for finding in inquiry.findings))


def check_folder(inquiry: Inquiry, run_dir: Path, leader: bool) -> None:
    token, rank = inquiry.share(secrets.token_hex(4)), inquiry.topology.rank
    own = (lambda: dataset.leave_token(run_dir, token)) if rank == 0 else None
    inquiry.ask("run folder of rank 0", own, LOOK_S)
    try:
        seen = (lambda: dataset.try_folder(run_dir, token, rank)) if leader else None
        inquiry.check("run folder", seen, dataset.judge_folder, LOOK_S)
    finally:
        if rank == 0:
            within(LOOK_S, lambda: dataset.take_token(run_dir, token))


def check_network(inquiry: Inquiry, leader: bool, claimed: list[Device]) -> None:
    """Names and interfaces first: what they say is what the rest is measured by."""
    said = inquiry.ask("addresses", own_addresses if leader else None, LOOK_S)
    table = inquiry.share({answer.host: answer.value for answer in said})
    inquiry.check("host names", (lambda: host.names(table)) if leader else None, host.judge_names, RESOLVE_S)
    way = (lambda: network.interface(table)) if leader else None
    ways = inquiry.check("interface", way, network.judge_interfaces, RESOLVE_S)
    addresses = inquiry.share({answer.host: answer.value["address"] for answer in ways})
    if inquiry.topology.world_size > 1:
        address = addresses.get(inquiry.topology.host)
        with ExitStack() as stack:
            check_pairs(inquiry, addresses, address if leader else None, stack)
        check_ring(inquiry, address, claimed)


def check_pairs(inquiry: Inquiry, addresses: dict[str, str], address: str | None, stack: ExitStack) -> None:
    """Round after round, each host in one pair at a time; whoever seems slow is measured once more."""
    own_host = inquiry.topology.host
    ports = inquiry.ask(
        "open ports", (lambda: stack.enter_context(wire.answering(address))) if address else None, LOOK_S
    )
    where = inquiry.share({answer.host: [addresses[answer.host], answer.value] for answer in ports})
    all_rounds = list(network.rounds(sorted(where)))
    every = max(1, -(-len(all_rounds) // MOST_ROUNDS))
    pairs: dict[tuple[str, str], wire.Pair] = {}
    failed: dict[tuple[str, str], str] = {}

    def measure(round_: Sequence[Sequence[str]]) -> None:
        peer = next((b for a, b in round_ if a == own_host and address), None)
        probe = (lambda: asdict(wire.measure(*where[peer]))) if peer else None
        own = {"pair": [own_host, peer], **within(NETWORK_S, probe)} if probe else None
        said = inquiry.meeting.gather(own, NETWORK_S, "pairs")
        for answer in filter(None, said.values()):
            pair = tuple(answer["pair"])
            if "error" in answer:
                failed[pair] = answer["error"]["saw"]
            else:
                found = wire.Pair(**answer["value"])
                pairs[pair] = network.better(pairs[pair], found) if pair in pairs else found
        inquiry.share()  # no round begins before the last one is over

    for round_ in all_rounds[::every]:
        measure(round_)
    again = inquiry.share(network.slow_pairs(pairs) if pairs else [])
    for pair in again:
        measure([pair])
    if inquiry.meeting.is_root and len(where) > 1:
        inquiry.find(*network.judge_pairs(pairs, failed, len(where) * (len(where) - 1) // 2))
        if pairs:
            inquiry.find(network.judge_clocks(pairs, own_host))


def check_ring(inquiry: Inquiry, address: str | None, claimed: list[Device]) -> None:
    """All ranks at once, first by plain TCP, then by Horovod; only where every rank is ready for it."""
    rank, size = inquiry.topology.rank, inquiry.topology.world_size
    with socket.create_server((address or "", 0)) as listener:
        place = [address, listener.getsockname()[1]] if address and claimed else None
        places = inquiry.ask("places in the ring", lambda: place, LOOK_S)
        ring = [answer.value for answer in places if answer.value]
        ring = inquiry.share(ring if len(ring) == size else [])
        if not ring:
            saw = "not measured: not every rank has an answer, an interface and a device"
            inquiry.find(Finding("allreduce", False, saw, "all of them", "what else is found here"))
            return
        following = tuple(ring[(rank + 1) % size])
        moved = inquiry.ask("ring of plain TCP", lambda: wire.ring_rate(listener, following), NETWORK_S)
    reduced = inquiry.ask("allreduce", lambda: network.allreduce_seconds(claimed[0]), NETWORK_S)
    if len(moved) == len(reduced) == size:
        inquiry.find(network.judge_ring(moved, reduced))


def attendance(inquiry: Inquiry) -> list[Finding]:
    """Who did not answer, and what it was asked; rank 0 alone knows."""
    if not inquiry.meeting.absent:
        ranks = [Answer(rank, name, None) for rank, name in sorted(inquiry.hosts.items())]
        return [Finding("ranks", True, f"{len(ranks)} answered: {who(ranks)}")]
    came = [Answer(rank, name, None) for rank, name in sorted(inquiry.hosts.items())]
    findings = []
    for what in dict.fromkeys(asked for _, asked in inquiry.meeting.absent.values()):
        lost = {rank: name for rank, (name, asked) in inquiry.meeting.absent.items() if asked == what}
        if what == "come":
            saw = f"never came: {spans(lost)}; there are {who(came)}"
            fix = "see what the launcher said; is that host up, and has it this package?"
        else:
            known = [Answer(rank, name, None) for rank, name in sorted(lost.items())]
            saw = f"{who(known)} did not answer when asked about: {what}"
            fix = "on that host: `ps`, `dmesg`, and what the question touches"
        hosts = tuple(dict.fromkeys(name for name in lost.values() if name))
        findings.append(Finding("ranks", False, saw, "an answer of every rank", fix, hosts))
    return findings
