"""Run probes on all ranks, with a timeout, and collect the findings on rank 0."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from horovod_owt.errors import OwtError
from horovod_owt.parallel.control_channel import CONNECT, ControlChannel
from horovod_owt.preflight.findings import Answer, Finding, grouped, hosts_of, spans, who
from horovod_owt.topology import Topology

log = logging.getLogger(__name__)

# Timeout of a broadcast by rank 0, which may itself be slow; its death is noticed at once.
BROADCAST_S = 300.0


class Probes:
    """Runs probes on all ranks, which must make the same calls; only rank 0 gets answers and findings."""

    def __init__(self, channel: ControlChannel, topology: Topology) -> None:
        self.channel, self.topology = channel, topology
        self.findings: list[Finding] = []
        self._asking = ""
        self.hosts = {0: topology.host}  # by rank, of all ranks that have answered so far

    @property
    def speaks_for_host(self) -> bool:
        return self.topology.local_rank == 0

    def gather(
        self, what: str, probe: Callable[[], Any] | None, limit_s: float, *, each_host: bool = False
    ) -> list[Answer]:
        """The results of `probe`, in rank order, except from ranks whose probe is None.

        With `each_host`, one rank per host runs it. A probe that raises or times out becomes a finding.
        """
        if self.channel.is_root and what != self._asking:
            log.info("preflight: %s", what)
        self._asking = what
        if each_host and not self.speaks_for_host:
            probe = None
        own = {"host": self.topology.host, **(within(limit_s, probe) if probe else {})}
        results = self.channel.gather(own, limit_s, what)
        answers = [Answer(rank, answer["host"], answer) for rank, answer in results.items()]
        self.hosts |= {answer.rank: answer.host for answer in answers}
        self._note_errors(what, [answer for answer in answers if "error" in answer.value])
        return [Answer(a.rank, a.host, a.value["value"]) for a in answers if "value" in a.value]

    def check(
        self,
        what: str,
        probe: Callable[[], Any] | None,
        judge: Callable[[list[Answer]], list[Finding]],
        limit_s: float,
        *,
        each_host: bool = False,
    ) -> list[Answer]:
        """Run the probe, and add the findings that `judge` makes of the answers, if there are any."""
        answers = self.gather(what, probe, limit_s, each_host=each_host)
        if answers:
            self.report(*judge(answers))
        return answers

    def report(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def judge_attendance(self) -> list[Finding]:
        """Findings about ranks that did not answer, on rank 0."""
        if not self.channel.absent:
            ranks = [Answer(rank, name, None) for rank, name in sorted(self.hosts.items())]
            return [Finding("ranks", True, f"{len(ranks)} answered: {who(ranks)}")]
        came = [Answer(rank, name, None) for rank, name in sorted(self.hosts.items())]
        findings = []
        for what in dict.fromkeys(asked for _, asked in self.channel.absent.values()):
            lost = {rank: name for rank, (name, asked) in self.channel.absent.items() if asked == what}
            if what == CONNECT:
                saw = f"never connected: {spans(lost)}; connected: {who(came)}"
                fix = "see the launcher's output; check that the host is up and has this package"
            else:
                known = [Answer(rank, name, None) for rank, name in sorted(lost.items())]
                saw = f"{who(known)} did not answer: {what}"
                fix = "check `ps` and `dmesg` on that host, and what the check uses"
            hosts = tuple(dict.fromkeys(name for name in lost.values() if name))
            findings.append(Finding("ranks", False, saw, "an answer from every rank", fix, hosts))
        return findings

    def broadcast(self, value: Any = None) -> Any:
        return self.channel.broadcast(value, BROADCAST_S)

    def _note_errors(self, what: str, failed: Sequence[Answer]) -> None:
        errors = grouped(
            failed, lambda value: tuple(value["error"][part] for part in ("saw", "wanted", "fix"))
        )
        for (saw, wanted, fix), having in errors.items():
            self.report(Finding(what, False, f"{saw}, on {who(having)}", wanted, fix, hosts_of(having)))


def within(limit_s: float, probe: Callable[[], Any]) -> dict[str, Any]:
    """`{"value": result of probe}`, or `{"error": {saw, wanted, fix}}` if it raises or times out.

    It runs in a thread, which is abandoned on a timeout, because a wait for a dead file server cannot be
    interrupted.
    """
    outcome: list[dict[str, Any]] = []

    def run() -> None:
        try:
            outcome.append({"value": probe()})
        except OwtError as error:
            outcome.append({"error": {"saw": error.saw, "wanted": error.wanted, "fix": error.fix}})
        except Exception as error:
            outcome.append({"error": {"saw": f"{type(error).__name__}: {error}", "wanted": "", "fix": ""}})

    thread = threading.Thread(target=run, daemon=True, name="probe")
    thread.start()
    thread.join(limit_s)
    timeout = {"error": {"saw": f"no answer in {limit_s:g} s", "wanted": "", "fix": ""}}
    return outcome[0] if outcome else timeout
