"""The command of an elastic job: ranks may come and go, by host on a cluster, one by one on a box."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.topology import BOX_PLACES, box_hosts


@dataclass(frozen=True)
class ElasticJob:
    """Where ranks may run: on `places` of this box, or on the hosts that a file names at the time."""

    train: Sequence[str]  # the words after `owt train`
    interface: str
    places: int | None = None
    hosts_file: Path | None = None
    min_ranks: int = 1
    max_ranks: int | None = None
    cooldown_s: tuple[int, int] = (10, 600)  # a host that lost a rank is left alone for so long; it doubles

    def __post_init__(self) -> None:
        most = self.max_ranks or self.places
        if most and self.min_ranks > most:  # Horovod would wait for ten minutes
            raise ConfigError(f"at least {self.min_ranks} ranks, of {most} at most", fix="fewer --min-ranks")

    def argv(self, discover_hosts: Path) -> list[str]:
        """horovodrun and its words; `discover_hosts` is what prints the hosts in a file."""
        if self.places:
            hosts = ["printf", "%s:1\\n", *box_hosts(self.places)]
        else:
            hosts = [str(discover_hosts), str(self.hosts_file)]
        most = self.max_ranks or self.places
        return [
            *(sys.executable, "-m", "horovod_owt.launch.horovodrun", "--gloo"),
            *("-np", str(self.min_ranks), "--min-np", str(self.min_ranks)),
            *(("--max-np", str(most)) if most else ()),
            *("--network-interfaces", self.interface),
            *("--blacklist-cooldown-range", *map(str, self.cooldown_s)),
            *("--host-discovery-script", shlex.join(hosts)),  # a shell of Horovod's runs it
            *("owt", "train", *self.train),
        ]

    def environment(self) -> dict[str, str]:
        return {BOX_PLACES: str(self.places)} if self.places else {}
