"""All ranks are asked the same, each answers in time or is named, and rank 0 keeps what is found."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from horovod_owt.errors import OwtError
from horovod_owt.parallel.meeting import CONNECT, Meeting
from horovod_owt.preflight.findings import Answer, Finding, grouped, hosts_of, spans, who
from horovod_owt.topology import Topology

log = logging.getLogger(__name__)

# For a word of rank 0, which may itself be slow at everything; if it dies, that is heard at once.
WORD_S = 300.0


class Inquiry:
    """Asks all ranks the same, and keeps the findings; on other ranks than 0 there are never answers."""

    def __init__(self, meeting: Meeting, topology: Topology) -> None:
        self.meeting, self.topology = meeting, topology
        self.findings: list[Finding] = []
        self._asking = ""
        self.hosts = {0: topology.host}  # by rank, of all that have ever answered

    @property
    def speaks_for_host(self) -> bool:
        return self.topology.local_rank == 0

    def ask(
        self, what: str, probe: Callable[[], Any] | None, limit_s: float, *, each_host: bool = False
    ) -> list[Answer]:
        """What `probe` gave on each rank, in rank order; a rank without one has nothing to say.

        With `each_host`, one rank speaks for its host. A probe that raises or takes too long is a finding by
        itself.
        """
        if self.meeting.is_root and what != self._asking:
            log.info("preflight: %s", what)
        self._asking = what
        if each_host and not self.speaks_for_host:
            probe = None
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
        *,
        each_host: bool = False,
    ) -> list[Answer]:
        """Ask, and keep what `judge` finds in the answers, if there are any."""
        answers = self.ask(what, probe, limit_s, each_host=each_host)
        if answers:
            self.find(*judge(answers))
        return answers

    def find(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def attendance(self) -> list[Finding]:
        """Who did not answer, and what it was asked; rank 0 alone knows."""
        if not self.meeting.absent:
            ranks = [Answer(rank, name, None) for rank, name in sorted(self.hosts.items())]
            return [Finding("ranks", True, f"{len(ranks)} answered: {who(ranks)}")]
        came = [Answer(rank, name, None) for rank, name in sorted(self.hosts.items())]
        findings = []
        for what in dict.fromkeys(asked for _, asked in self.meeting.absent.values()):
            lost = {rank: name for rank, (name, asked) in self.meeting.absent.items() if asked == what}
            if what == CONNECT:
                saw = f"never came: {spans(lost)}; there are {who(came)}"
                fix = "see what the launcher said; is that host up, and has it this package?"
            else:
                known = [Answer(rank, name, None) for rank, name in sorted(lost.items())]
                saw = f"{who(known)} did not answer when asked about: {what}"
                fix = "on that host: `ps`, `dmesg`, and what the question touches"
            hosts = tuple(dict.fromkeys(name for name in lost.values() if name))
            findings.append(Finding("ranks", False, saw, "an answer of every rank", fix, hosts))
        return findings

    def broadcast(self, value: Any = None) -> Any:
        return self.meeting.broadcast(value, WORD_S)

    def _note_trouble(self, what: str, failed: Sequence[Answer]) -> None:
        errors = grouped(
            failed, lambda value: tuple(value["error"][part] for part in ("saw", "wanted", "fix"))
        )
        for (saw, wanted, fix), having in errors.items():
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
