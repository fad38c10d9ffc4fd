"""The current nodes of a job: with --no-kill a job survives the loss of nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from horovod_owt.errors import OwtError
from horovod_owt.files import write_text
from horovod_owt.filesystem import temporary_folder
from horovod_owt.slurm.allocation import Allocation
from horovod_owt.slurm.client import ask, find_jobs
from horovod_owt.slurm.commands import hostnames_argv

POLL_S = 5.0  # interval of queries to slurmctld
# Delay until a lost node is removed from the file. Its ssh ends sooner, and Horovod continues without it in
# seconds; removing it while its ranks count as alive costs the others a Gloo timeout (97 instead of 25 s).
LEAVE_S = 40.0


@contextmanager
def nodes_file(allocation: Allocation, say: Callable[[str], None]) -> Iterator[Path]:
    """A file with a line HOST:SLOTS for each of the job's nodes, kept up to date during the block."""
    with temporary_folder("owt-nodes-") as folder:
        file, over = folder / "hosts", threading.Event()
        write_hosts(file, allocation.hosts, allocation.ranks_per_node)
        follower = threading.Thread(target=_follow, args=(allocation, file, over, say), daemon=True)
        follower.start()
        try:
            yield file
        finally:
            over.set()
            follower.join()


def write_hosts(file: Path, hosts: Sequence[str], slots: int) -> None:
    """Atomically, because Horovod's driver reads it every second."""
    write_text(file, "".join(f"{host}:{slots}\n" for host in hosts))


def nodes_of(job_id: str) -> list[str]:
    """The job's current nodes; empty before it starts. Raises OwtError if Slurm does not answer.

    Of an array or a heterogeneous job, the nodes of all tasks or components that are running.
    """
    nodes = ",".join(record.nodes for record in find_jobs(job_id) if record.nodes)
    return list(dict.fromkeys(ask(hostnames_argv(nodes)).split())) if nodes else []


def _follow(allocation: Allocation, file: Path, over: threading.Event, say: Callable[[str], None]) -> None:
    hosts = list(allocation.hosts)
    while not over.wait(POLL_S):
        try:
            found = nodes_of(allocation.job_id)
        except OwtError:  # slurmctld is restarting or busy
            continue
        if found and found != hosts:
            lost = [host for host in hosts if host not in found]
            say(f"lost nodes {', '.join(lost)}; remaining: {', '.join(found)}")
            over.wait(LEAVE_S)
            write_hosts(file, found, allocation.ranks_per_node)
            hosts = found
