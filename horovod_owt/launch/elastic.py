"""Start an elastic job: hosts join and leave on a cluster, single ranks on one host."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from horovod_owt.errors import ConfigError
from horovod_owt.launch.command import HOROVODRUN, check_folder_for_ssh, show
from horovod_owt.launch.hosts import read_hosts
from horovod_owt.launch.supervisor import Supervisor, say
from horovod_owt.parallel.interfaces import chosen_interface
from horovod_owt.topology import LOOPBACK_SLOTS, loopback_hosts

DISCOVER_HOSTS = Path(__file__).with_name("discover-hosts")


@dataclass(frozen=True)
class ElasticJob:
    """An elastic job on `slots` of this host, or on the hosts in a file, which may change."""

    train: Sequence[str]  # arguments of `owt train`
    interface: str
    slots: int | None = None
    hosts_file: Path | None = None
    min_ranks: int = 1
    max_ranks: int | None = None
    cooldown_s: tuple[int, int] = (10, 600)  # how long a host that lost a rank is not used; doubles

    def __post_init__(self) -> None:
        limit = self.max_ranks or self.slots
        if limit and self.min_ranks > limit:  # Horovod would wait ten minutes
            raise ConfigError(
                f"--min-ranks {self.min_ranks} with at most {limit} ranks", fix="lower --min-ranks"
            )

    def argv(self) -> list[str]:
        if self.slots:
            hosts = ["printf", "%s:1\\n", *loopback_hosts(self.slots)]
        else:
            hosts = ["sh", str(DISCOVER_HOSTS), str(self.hosts_file)]
        limit = self.max_ranks or self.slots
        return [
            *HOROVODRUN,
            *("-np", str(self.min_ranks), "--min-np", str(self.min_ranks)),
            *(("--max-np", str(limit)) if limit else ()),
            *("--network-interfaces", self.interface),
            *("--blacklist-cooldown-range", *map(str, self.cooldown_s)),
            *("--host-discovery-script", shlex.join(hosts)),
            *("owt", "train", *self.train),
        ]

    def environment(self) -> dict[str, str]:
        return {LOOPBACK_SLOTS: str(self.slots)} if self.slots else {}

    @classmethod
    def on(
        cls, train: Sequence[str], *, interface: str | None, hosts_file: Path | None, **options
    ) -> ElasticJob:
        """A job with the interface determined from the hosts currently in the file."""
        hosts = list(read_hosts(hosts_file)) if hosts_file else ["localhost"]
        return cls(train, interface=chosen_interface(interface, hosts), hosts_file=hosts_file, **options)


def run(job: ElasticJob, *, max_restarts: int, dry_run: bool) -> int:
    """Start the job; returns its exit code, from outcome.json if the run wrote one."""
    if job.interface != "lo":
        check_folder_for_ssh(os.getcwd())
    if dry_run:
        return show(job.argv(), job.environment())
    say(f"interface {job.interface}")
    os.environ.update(job.environment())
    return Supervisor(job.argv(), max_restarts=max_restarts).run()
