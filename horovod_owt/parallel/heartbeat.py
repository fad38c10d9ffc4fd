"""Who is there, beside Horovod: a rank that died is named at once, one that keeps the others waiting in time.

Rank 0 listens, every other rank keeps a connection to it; a thread of each tells the other end twice a second
what its main thread does. The kernel closes the connections of a killed process, and a stopped one falls
silent. One JSON object a line; a token that only the job's ranks know opens a connection.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from horovod_owt.parallel.activity import now
from horovod_owt.parallel.collectives import broadcast_object
from horovod_owt.parallel.rendezvous import CONNECT_S, Rendezvous, abort_connections, connect, json_line
from horovod_owt.parallel.runtime import World

log = logging.getLogger(__name__)

BEAT_S = 0.5
SILENT_S = 3.0  # without a beat: stopped, or its host is out of reach
GOODBYE_S = 2 * CONNECT_S  # to end what is under way, and to take leave


@dataclass
class Peer:
    """What is known of a rank at the other end of a connection."""

    rank: int
    host: str
    connection: socket.socket
    heard: float = field(default_factory=monotonic)
    step: int = 0
    what: str = "starting"
    waiting: bool = False
    since: float = field(default_factory=monotonic)
    said_goodbye: bool = False
    unread: bytes = b""

    def hear(self, beat: dict[str, Any]) -> None:
        self.heard = monotonic()
        if "bye" in beat:
            self.said_goodbye = True
        if "what" in beat:
            self.step, self.what, self.waiting = int(beat["step"]), str(beat["what"]), bool(beat["waiting"])
            self.since = self.heard - float(beat["for_s"])

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Heartbeat:
    """While it is entered, lost and late ranks are named.

    Every rank must make one at the same time. `report` is told, on rank 0 (on rank 1 if it is rank 0 that is
    silent), who keeps whom waiting, first after `report_s` seconds and then as often; `give_up` the same once
    that took `give_up_s`; `dump` is called on every rank that can be reached when a report is made.
    `on_death` is told who died, at once, on the ranks that see it: rank 0, and all others if it was rank 0.
    With `regroup_s`, for a job that outlives its ranks, the collectives of all fail once one has died: Gloo
    itself tells those that exchange bytes with it, and the others wait for them. And a host whose kernel
    acknowledges nothing for so long (that of a stopped rank does) counts as dead with its ranks.
    """

    def __init__(
        self,
        world: World,
        *,
        report_s: float,
        give_up_s: float,
        report: Callable[[str], None],
        give_up: Callable[[str], None],
        dump: Callable[[str], None],
        on_death: Callable[[str], None],
        regroup_s: float | None = None,
    ) -> None:
        self._world, self._report_s, self._give_up_s = world, report_s, give_up_s
        self._report, self._give_up, self._dump, self._on_death = report, give_up, dump, on_death
        self._regroup_s = regroup_s
        self._lost: list[Peer] = []
        self._someone_lost, self._ending = threading.Event(), threading.Event()
        self._peers: dict[int, Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._rendezvous = Rendezvous(world.host, world.size) if world.is_root else None
        self._address = broadcast_object(self._rendezvous and self._rendezvous.address, "heartbeat")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say goodbye, so that nobody takes this rank for dead.

        The thread of a busy host may come late to that; what is waited for here in vain is a peer that hangs.
        """
        self._ending.set()
        self._thread.join(timeout=GOODBYE_S)

    def lost(self, wait_s: float = 2.0) -> str:
        """The ranks known to have died, in words; waits for one to be known, empty if there is none."""
        self._someone_lost.wait(wait_s)
        return ", ".join(f"{peer} (last heard of after step {peer.step})" for peer in self._lost)

    def _run(self) -> None:
        try:
            if self._rendezvous:
                self._selector.register(self._rendezvous.listener, selectors.EVENT_READ)
            else:
                self._connect()
            self._watch()
        except OSError as error:
            log.warning("rank %d takes no part in the heartbeat: %s", self._world.rank, error)
        finally:
            for peer in self._peers.values():
                self._tell(peer, {"bye": True})
                peer.connection.close()
            if self._rendezvous:
                self._rendezvous.close()
            self._selector.close()

    def _watch(self) -> None:
        next_beat, next_report = 0.0, self._report_s
        while not self._ending.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                if key.data is not None:
                    self._listen(key.data)
                elif peer := self._rendezvous.accept():
                    self._keep(Peer(*peer))
            if monotonic() >= next_beat:
                next_beat = monotonic() + BEAT_S
                for peer in list(self._peers.values()):
                    beat = dict(step=now.step, what=now.what, waiting=now.waiting)
                    self._tell(peer, {**beat, "for_s": round(monotonic() - now.since, 3)})
            waited_s, who = self._who_keeps_whom()
            if waited_s < self._report_s:
                next_report = self._report_s
            elif waited_s >= self._give_up_s:
                self._dump_everywhere(who)
                # A stopped rank that is woken would take our end for a death, and write that over the reason.
                for bereaved in self._peers.values():
                    self._tell(bereaved, {"bye": True})
                self._give_up(who)
                return
            elif waited_s >= next_report:
                next_report += self._report_s
                self._dump_everywhere(who)
                self._report(who)

    def _who_keeps_whom(self) -> tuple[float, str]:
        """How long the longest waits in a collective, and for whom, in words; 0 if it is not ours to say.

        Rank 0 says it for all. Others see rank 0 alone, and rank 1 speaks when that is silent.
        """
        peers, moment = list(self._peers.values()), monotonic()
        silent = [peer for peer in peers if moment - peer.heard > SILENT_S]
        if not self._world.is_root and (self._world.rank != 1 or not silent):
            return 0.0, ""
        here = Peer(
            self._world.rank, self._world.host, None, moment, now.step, now.what, now.waiting, now.since
        )
        waiting = [peer for peer in [here, *peers] if peer.waiting and peer not in silent]
        if not waiting:
            return 0.0, ""
        longest = min(waiting, key=lambda peer: peer.since)
        missing = [f"{peer} has been silent for {moment - peer.heard:.0f} s" for peer in silent]
        for peer in [here, *peers]:
            if peer not in silent and not (peer.waiting and peer.what == longest.what):
                doing = f"waits in {peer.what!r}" if peer.waiting else f"is busy: {peer.what}"
                missing.append(f"{peer} {doing}, for {moment - peer.since:.0f} s")
        ranks = ", ".join(str(peer.rank) for peer in sorted(waiting, key=lambda peer: peer.rank)[:8])
        more = f" and {len(waiting) - 8} more" if waiting[8:] else ""
        waited_s = moment - longest.since
        for_whom = "; ".join(missing[:8]) or "all ranks are there"
        who = f"ranks {ranks}{more} wait" if waiting[1:] else f"rank {ranks} waits"
        words = f"{who} in {longest.what!r} for {waited_s:.0f} s"
        return waited_s, f"{for_whom}; {words}, after step {longest.step}"

    def _dump_everywhere(self, why: str) -> None:
        self._dump(why)
        for peer in list(self._peers.values()):
            self._tell(peer, {"dump": why})

    def _connect(self) -> None:
        try:
            connection = connect(self._address, self._world.rank, self._world.host)
        except OSError as error:
            raise OSError(f"{error}: if it dies or hangs, nobody says who") from None
        self._keep(Peer(0, self._address.host, connection))

    def _keep(self, peer: Peer) -> None:
        peer.connection.settimeout(CONNECT_S)
        if self._regroup_s is not None:  # there is always a beat to be acknowledged
            limit_ms = int(1e3 * self._regroup_s)
            peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
        self._peers[peer.rank] = peer
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _listen(self, peer: Peer) -> None:
        arrived, died = b"", "its process died"
        try:
            arrived = peer.connection.recv(65536)
        except ConnectionError:
            pass
        except OSError as error:
            died = f"its host does not answer ({error.strerror or error})"
        *lines, peer.unread = (peer.unread + arrived).split(b"\n")
        for line in lines:
            beat = json.loads(line)
            peer.hear(beat)
            if "dump" in beat:
                self._dump(str(beat["dump"]))
            if "abort" in beat:
                self._abort_collectives()
        if not arrived:
            self._selector.unregister(peer.connection)
            peer.connection.close()
            del self._peers[peer.rank]
            if not peer.said_goodbye:
                self._lost.append(peer)
                log.error("%s is gone: %s, last heard of after step %d", peer, died, peer.step)
                self._on_death(self.lost(0.0))
                if self._regroup_s is not None:
                    for other in self._peers.values():
                        self._tell(other, {"abort": str(peer)})
                    self._abort_collectives()
                self._someone_lost.set()

    def _abort_collectives(self) -> None:
        """Let this rank's collectives fail; not once it has left, perhaps for the job's next world."""
        if not self._ending.is_set():
            abort_connections(keep={peer.connection.fileno() for peer in self._peers.values()})

    def _tell(self, peer: Peer, what: dict[str, Any]) -> None:
        try:
            peer.connection.sendall(json_line(what))
        except OSError:
            pass  # reading it tells why
