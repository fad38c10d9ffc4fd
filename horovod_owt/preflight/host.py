"""A host by itself: what is installed, what a process may use, and whether names lead to hosts and back."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from horovod_owt.parallel.interfaces import own_addresses
from horovod_owt.preflight.findings import Answer, Finding, agreement, at_least, hosts_of, who
from horovod_owt.topology import Topology
from horovod_owt.versions import code_digest, installed_versions

SHM_BYTES_PER_RANK = 256e6  # NCCL, Open MPI and torch's workers share memory there; Docker's default is 64 MB
FILES = 512  # open at a time by a rank, for itself: images, libraries, pipes
FILES_PER_PEER = 3  # a connection of Gloo's, of the heartbeat's, and one to spare
RESOLVERS = 16  # names asked for at a time: a dead name server answers none of them


def environment() -> dict[str, str]:
    """What this rank would compute with; loads torch and Horovod, and raises what they raise."""
    import torch

    from horovod_owt.parallel import runtime
    from horovod_owt.parallel.gpus import list_gpus

    return {
        **installed_versions(),
        "code": code_digest(),
        "horovod's operations": runtime.operations(),
        "torch's CUDA": torch.version.cuda or "none",
        "driver": next((gpu.driver for gpu in list_gpus()), "none"),
    }


def judge_environment(answers: Sequence[Answer]) -> list[Finding]:
    return agreement("versions", answers, fix="the same environment and checkout on every host: launch/setup")


def limits(topology: Topology) -> dict[str, Any]:
    """What the system lets this process have."""
    shm = os.statvfs("/dev/shm")
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": Path("/dev/infiniband").exists(),
        "shm_bytes": shm.f_bavail * shm.f_frsize,
        "cores": sorted(os.sched_getaffinity(0)),
        "local_size": topology.local_size,
    }


def judge_limits(answers: Sequence[Answer], world_size: int) -> list[Finding]:
    """Enough of everything for the ranks of each host."""
    files = FILES + FILES_PER_PEER * world_size
    return [
        at_least(
            "open files",
            [Answer(a.rank, a.host, _bounded(a.value["files"])) for a in answers],
            files,
            unit="files",
            wanted=f"at least {files} for {world_size} ranks",
            fix=f"`ulimit -n {files}`, or /etc/security/limits.conf; under Slurm: PropagateResourceLimits",
        ),
        _judge_locked_memory(answers),
        at_least(
            "/dev/shm",
            [Answer(a.rank, a.host, a.value["shm_bytes"] / a.value["local_size"]) for a in answers],
            SHM_BYTES_PER_RANK,
            unit="GB free a rank",
            scale=1e9,
            wanted=f"at least {SHM_BYTES_PER_RANK / 1e9:g}",
            fix="`mount -o remount,size=50% /dev/shm`; in a container --shm-size or --ipc=host",
        ),
        _judge_cores(answers),
    ]


def _bounded(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _judge_locked_memory(answers: Sequence[Answer]) -> Finding:
    """Verbs pin what they send: without leave to, NCCL and MPI fall back to TCP or die. Others need none."""
    bounded = [a for a in answers if a.value["infiniband"] and _bounded(a.value["locked_bytes"]) < 2**40]
    if bounded:
        saw = f"{bounded[0].value['locked_bytes'] / 1e6:.4g} MB beside InfiniBand on {who(bounded)}"
    else:
        some = any(a.value["infiniband"] for a in answers)
        saw = "unlimited where InfiniBand is" if some else "no InfiniBand that would need it"
    fix = "`ulimit -l unlimited`; for Slurm's jobs LimitMEMLOCK=infinity in slurmd's unit" if bounded else ""
    return Finding("locked memory", not bounded, saw, "unlimited beside InfiniBand", fix, hosts_of(bounded))


def _judge_cores(answers: Sequence[Answer]) -> Finding:
    """A core for each rank of a host, whether the launcher has bound them one by one or all together."""
    cores: dict[str, set[int]] = {}
    for answer in answers:
        cores.setdefault(answer.host, set()).update(answer.value["cores"])
    ranks = {answer.host: answer.value["local_size"] for answer in answers}
    short = [a for a in answers if len(cores[a.host]) < a.value["local_size"]]
    shown = [
        f"{host} {_count(len(cores[host]), 'core')} for {_count(ranks[host], 'rank')}"
        for host in (hosts_of(short) or cores)
    ]
    return Finding(
        "cores",
        not short,
        ", ".join(shown[:8]) + (f" and {len(shown) - 8} more hosts" if shown[8:] else ""),
        "a core for each rank",
        "--cpus-per-task, --cpus-per-gpu or --exclusive; mpirun --bind-to none; fewer ranks" if short else "",
        hosts_of(short),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def judge_addresses(answers: Sequence[Answer]) -> list[Finding]:
    """No two hosts of one name, as clones have it: all else here tells hosts apart by that."""
    seen: dict[str, set[tuple[str, ...]]] = {}
    for answer in answers:
        seen.setdefault(answer.host, set()).add(tuple(answer.value))
    return [
        Finding(
            "host names",
            False,
            f"{len(several)} hosts are called {host}: {'; '.join(', '.join(own) for own in sorted(several))}",
            "a name of its own for each",
            "`hostnamectl set-hostname`",
            (host,),
        )
        for host, several in seen.items()
        if len(several) > 1
    ]


def names(table: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What is wrong with the names of `table` (host -> its addresses) as seen from here; host -> trouble."""
    here = set(own_addresses())
    with ThreadPoolExecutor(RESOLVERS) as resolvers:
        said = resolvers.map(lambda host: _trouble_with(host, table[host], here), table)
        return {host: trouble for host, trouble in zip(table, said, strict=True) if trouble}


def _trouble_with(host: str, addresses: Sequence[str], here: set[str]) -> str:
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError as error:
        return f"does not resolve: {error.strerror or error}"
    if here & set(addresses):  # itself: Debian's own 127.0.1.1 does no harm
        found = {address for address in found if not address.startswith("127.")}
        return "" if found <= set(addresses) else f"resolves to {', '.join(sorted(found))}, which is not here"
    if not found & set(addresses):
        return f"resolves to {', '.join(sorted(found))}, which is none of its addresses"
    address = sorted(found & set(addresses))[0]
    try:
        first, others, _ = socket.gethostbyaddr(address)
    except OSError as error:
        return f"has no way back: {address} has no name ({error.strerror or error})"
    if host in (first, *others, address) or _short(host) in map(_short, (first, *others)):
        return ""
    return f"has no way back: {address} is called {first}"


def _short(host: str) -> str:
    return host.partition(".")[0].lower()


def judge_names(answers: Sequence[Answer]) -> list[Finding]:
    """Each host's name leads to it from every host, and its address back to the name."""
    seen_from: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        for host, trouble in answer.value.items():
            seen_from.setdefault((host, trouble), []).append(answer)
    if not seen_from:
        return [Finding("host names", True, f"{', '.join(hosts_of(answers)[:8])}: both ways, seen from each")]
    return [
        Finding(
            "host names",
            False,
            f"{host} {trouble}, seen from {', '.join(hosts_of(seen))}",
            "a name that leads to the host, and its address back",
            f"DNS, or /etc/hosts on {', '.join(hosts_of(seen))}",
            (host,),
        )
        for (host, trouble), seen in seen_from.items()
    ]
