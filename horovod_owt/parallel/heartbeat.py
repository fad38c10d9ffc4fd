"""A heartbeat between ranks, independent of Horovod, that detects dead and hung ranks.

Rank 0 listens and every other rank keeps a connection to it; twice a second a thread at each end sends what
its main thread is doing (less often in jobs of more than 256 ranks, as each beat takes rank 0 about 60 us).
The kernel closes the connections of a killed process, and a stopped one sends nothing. Messages are one JSON
object per line. Rank 0 stops listening once all ranks are connected.
"""

from __future__ import annotations

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
from horovod_owt.parallel.lines import Lines, json_line
from horovod_owt.parallel.rendezvous import Address, Rendezvous, abort_connections, connect_to_root
from horovod_owt.parallel.runtime import World

log = logging.getLogger(__name__)

BEAT_S = 0.5
MAX_BEATS_PER_S = 512  # of all ranks together; with more ranks each beats less often
SILENT_S = 3.0  # without a beat, at one every BEAT_S: the rank is stopped or its host unreachable
CHECK_S = 0.2  # between checks of all peers
MAX_NAMED = 8  # ranks named in a message
SEND_LIMIT_S = 5.0  # for the kernel to accept a message
LINE_BYTES = 1 << 16  # of a message
GOODBYE_LIMIT_S = 2 * SEND_LIMIT_S  # to finish the beat in progress and to send the goodbye


@dataclass
class Peer:
    """The last known state of the rank at the other end of a connection."""

    rank: int
    host: str
    connection: socket.socket
    heard: float = field(default_factory=monotonic)
    step: int = 0
    what: str = "starting"
    waiting: bool = False
    since: float = field(default_factory=monotonic)
    said_goodbye: bool = False
    lines: Lines = field(default_factory=lambda: Lines(LINE_BYTES))

    def update(self, beat: dict[str, Any]) -> None:
        self.heard = monotonic()
        if "bye" in beat:
            self.said_goodbye = True
        if "what" in beat:
            self.step, self.what, self.waiting = int(beat["step"]), str(beat["what"]), bool(beat["waiting"])
            self.since = self.heard - float(beat["for_s"])

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Heartbeat:
    """Detects dead and hung ranks while it is entered. Every rank must create one at the same time.

    The callbacks get a description of the ranks concerned:

    report     every `report_s` seconds that a collective waits, on rank 0 (on rank 1 if rank 0 is silent)
    give_up    after `give_up_s` seconds, on the same rank
    dump       with each report, on every reachable rank
    on_death   as soon as a rank dies, on the ranks that notice: rank 0, or all others if rank 0 died

    With `regroup_s` (elastic jobs), the collectives of all ranks fail as soon as one rank has died: Gloo
    fails only those of ranks that exchange data with the dead one. A host whose kernel acknowledges nothing
    for that long counts as dead with its ranks (the kernel of a stopped process still acknowledges).
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
        slower = max(1.0, world.size / MAX_BEATS_PER_S / BEAT_S)
        self.beat_s, self._silent_s, self._check_s = BEAT_S * slower, SILENT_S * slower, CHECK_S * slower
        self._lost: list[Peer] = []
        self._someone_lost, self._ending = threading.Event(), threading.Event()
        self._peers: dict[int, Peer] = {}
        self._selector = selectors.DefaultSelector()
        one_host = world.local_size >= world.size
        self._rendezvous = Rendezvous(world.host, world.size, one_host=one_host) if world.is_root else None
        self._address = broadcast_object(
            self._rendezvous and self._rendezvous.address, "heartbeat", kind=Address
        )
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Send a goodbye, so that the peers do not report this rank as dead."""
        self._ending.set()
        self._thread.join(timeout=GOODBYE_LIMIT_S)  # long, for a busy host; reached only if a peer hangs

    def lost(self, wait_s: float = 2.0) -> str:
        """The ranks known to have died, as text; waits up to `wait_s` for the first, else empty."""
        self._someone_lost.wait(wait_s)
        lost = list(self._lost)
        named = ", ".join(f"{peer} (last heard from after step {peer.step})" for peer in lost[:MAX_NAMED])
        return named + _and_more(len(lost))

    def silent(self) -> list[Peer]:
        """The ranks that are silent now or have died, on rank 0. Thread-safe."""
        moment = monotonic()
        hung = [peer for peer in list(self._peers.values()) if moment - peer.heard > self._silent_s]
        return [*self._lost, *hung]

    def _run(self) -> None:
        try:
            if self._rendezvous:
                self._selector.register(self._rendezvous.listener, selectors.EVENT_READ)
            else:
                self._connect()
            self._watch()
        except OSError as error:
            log.warning("rank %d has no heartbeat: %s", self._world.rank, error)
        finally:
            self._send_all({"bye": True})
            for peer in self._peers.values():
                peer.connection.close()
            self._stop_listening()
            self._selector.close()

    def _watch(self) -> None:
        # Ranks' beats are spread over the interval, so that they do not delay rank 0's training all at once.
        next_beat = monotonic() + self.beat_s * self._world.rank / self._world.size
        next_check, next_report = 0.0, self._report_s
        while not self._ending.is_set():
            for key, _ in self._selector.select(timeout=CHECK_S):
                if key.data is not None and self._peers.get(key.data.rank) is key.data:
                    self._read(key.data)
            self._admit()
            if monotonic() >= next_beat:
                next_beat = monotonic() + self.beat_s
                beat = dict(step=now.step, what=now.what, waiting=now.waiting)
                self._send_all({**beat, "for_s": round(monotonic() - now.since, 3)})
            if monotonic() < next_check:
                continue
            next_check = monotonic() + self._check_s
            waited_s, who = self._longest_wait()
            if waited_s < self._report_s:
                next_report = self._report_s
            elif waited_s >= self._give_up_s:
                self._dump_everywhere(who)
                # A stopped rank that resumes would take our exit for a death and overwrite the outcome.
                self._send_all({"bye": True})
                self._give_up(who)
                return
            elif waited_s >= next_report:
                next_report += self._report_s
                self._dump_everywhere(who)
                self._report(who)

    def _longest_wait(self) -> tuple[float, str]:
        """Seconds of the longest wait in a collective, and, if it is long enough to report, a description.

        0 if this rank does not report: rank 0 does, or rank 1 while rank 0 is silent.
        """
        peers, moment = list(self._peers.values()), monotonic()
        silent = {peer.rank: peer for peer in peers if moment - peer.heard > self._silent_s}
        if not self._world.is_root and (self._world.rank != 1 or not silent):
            return 0.0, ""
        here = Peer(
            self._world.rank, self._world.host, None, moment, now.step, now.what, now.waiting, now.since
        )
        waiting = [peer for peer in [here, *peers] if peer.waiting and peer.rank not in silent]
        if not waiting:
            return 0.0, ""
        longest = min(waiting, key=lambda peer: peer.since)
        waited_s = moment - longest.since
        if waited_s < self._report_s:
            return waited_s, ""
        missing = [f"{peer} has been silent for {moment - peer.heard:.0f} s" for peer in silent.values()]
        for peer in [here, *peers]:
            if peer.rank not in silent and not (peer.waiting and peer.what == longest.what):
                doing = f"waits in {peer.what!r}" if peer.waiting else f"is in {peer.what!r}"
                missing.append(f"{peer} {doing}, for {moment - peer.since:.0f} s")
        ranks = ", ".join(map(str, sorted(peer.rank for peer in waiting)[:MAX_NAMED]))
        who = f"ranks {ranks}{_and_more(len(waiting))} wait" if waiting[1:] else f"rank {ranks} waits"
        whom = ("; ".join(missing[:MAX_NAMED]) or "no rank is missing") + _and_more(len(missing))
        wait = f"{who} in {longest.what!r} for {waited_s:.0f} s, after step {longest.step}"
        return waited_s, f"{whom}; {wait}"

    def _dump_everywhere(self, why: str) -> None:
        self._dump(why)
        self._send_all({"dump": why})

    def _admit(self) -> None:
        if self._rendezvous:
            for peer in self._rendezvous.admit():
                self._add(Peer(*peer))
            if len(self._peers) == self._world.size - 1:
                self._stop_listening()

    def _stop_listening(self) -> None:
        if self._rendezvous:
            self._selector.unregister(self._rendezvous.listener)
            self._rendezvous.close()
            self._rendezvous = None

    def _connect(self) -> None:
        try:
            connection = connect_to_root(self._address, self._world.rank, self._world.host)
        except OSError as error:
            raise OSError(f"{error}; if it dies or hangs it cannot be named") from None
        self._add(Peer(0, self._address.host, connection))

    def _add(self, peer: Peer) -> None:
        if peer.rank in self._peers:  # it gave up its first connection and reconnected
            self._remove(self._peers[peer.rank])
        peer.connection.settimeout(SEND_LIMIT_S)
        if self._regroup_s is not None:  # beats make sure that there is data to acknowledge
            limit_ms = int(1e3 * self._regroup_s)
            peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
        self._peers[peer.rank] = peer
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _remove(self, peer: Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        del self._peers[peer.rank]

    def _read(self, peer: Peer) -> None:
        arrived, died = b"", "its process died"
        try:
            arrived = peer.connection.recv(65536)
            for beat in peer.lines.feed(arrived):
                self._handle(peer, beat)
        except ConnectionError:
            pass
        except OSError as error:
            died = f"its host does not answer ({error.strerror or error})"
        except (ValueError, KeyError, TypeError) as error:
            arrived, died = b"", f"it sent an invalid heartbeat: {error}"
        if not arrived:
            self._remove(peer)
            if not peer.said_goodbye:
                self._report_death(peer, died)

    def _handle(self, peer: Peer, beat: dict[str, Any]) -> None:
        peer.update(beat)
        if "dump" in beat:
            self._dump(str(beat["dump"]))
        if "abort" in beat:
            self._abort_collectives()

    def _report_death(self, peer: Peer, reason: str) -> None:
        self._lost.append(peer)
        log.error("lost %s: %s, last heard from after step %d", peer, reason, peer.step)
        if len(self._lost) <= MAX_NAMED:  # the message would not name further ones
            self._on_death(self.lost(0.0))
        if self._regroup_s is not None:
            self._send_all({"abort": str(peer)})
            self._abort_collectives()
        self._someone_lost.set()

    def _abort_collectives(self) -> None:
        """Make this rank's collectives fail, unless it is leaving, perhaps to join the next world."""
        if not self._ending.is_set():
            abort_connections(keep={peer.connection.fileno() for peer in self._peers.values()})

    def _send_all(self, what: dict[str, Any]) -> None:
        line = json_line(what)
        for peer in list(self._peers.values()):
            try:
                peer.connection.sendall(line)
            except OSError:
                pass  # the next read from it reports why


def _and_more(count: int) -> str:
    """How many of `count` ranks a message does not name."""
    return f" and {count - MAX_NAMED} more" if count > MAX_NAMED else ""
