"""Checks of hosts: installed versions, resource limits, host names."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from horovod_owt.cgroups import cpu_quota
from horovod_owt.filesystem import free_space
from horovod_owt.parallel.interfaces import is_loopback, usable
from horovod_owt.preflight.findings import Answer, Finding, agreement, at_least, hosts_of, or_inf, who
from horovod_owt.topology import Topology
from horovod_owt.versions import code_digest, installed_versions

SHM_BYTES_PER_RANK = 256e6  # used by NCCL, Open MPI and torch's workers; Docker's default is 64 MB
FILES = 512  # open files of a rank: images, libraries, pipes
FILES_PER_PEER = 3  # a connection of Gloo, one of the heartbeat, and one in reserve
INFINIBAND = Path("/dev/infiniband")
RESOLVERS = 16  # parallel lookups, in case a name server is dead


def environment() -> dict[str, str]:
    """This rank's versions; loads torch and Horovod, and raises whatever they raise."""
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
    """The resource limits of this process."""
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": any(INFINIBAND.glob("uverbs*")),  # rdma_cm is there without a card, too
        "shm_bytes": _shm_bytes(),
        "cores": sorted(os.sched_getaffinity(0)),
        "cpu_quota": cpu_quota(),
        "local_size": topology.local_size,
    }


def _shm_bytes() -> int | None:
    """Free bytes of /dev/shm; None if it has no limit, as with podman's --shm-size=0."""
    try:
        return free_space(Path("/dev/shm"))[0]
    except FileNotFoundError:
        return 0


def judge_limits(answers: Sequence[Answer], world_size: int) -> list[Finding]:
    """The limits suffice for the ranks of each host."""
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
            [Answer(a.rank, a.host, or_inf(a.value["shm_bytes"]) / a.value["local_size"]) for a in answers],
            SHM_BYTES_PER_RANK,
            unit="GB free per rank",
            scale=1e9,
            wanted=f"at least {SHM_BYTES_PER_RANK / 1e9:g}",
            fix="`mount -o remount,size=50% /dev/shm`; in a container --shm-size or --ipc=host",
        ),
        _judge_cores(answers),
    ]


def _bounded(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _judge_locked_memory(answers: Sequence[Answer]) -> Finding:
    """InfiniBand verbs pin memory; if that is limited, NCCL and MPI fall back to TCP or fail."""
    bounded = [a for a in answers if a.value["infiniband"] and _bounded(a.value["locked_bytes"]) < 2**40]
    if bounded:
        saw = f"{bounded[0].value['locked_bytes'] / 1e6:.4g} MB, with InfiniBand, on {who(bounded)}"
    else:
        some = any(a.value["infiniband"] for a in answers)
        saw = "unlimited on hosts with InfiniBand" if some else "not needed: no InfiniBand"
    fix = "`ulimit -l unlimited`; for Slurm jobs LimitMEMLOCK=infinity in slurmd's unit" if bounded else ""
    return Finding("locked memory", not bounded, saw, "unlimited with InfiniBand", fix, hosts_of(bounded))


def _judge_cores(answers: Sequence[Answer]) -> Finding:
    """Each host has a core for each of its ranks, whether the launcher bound them singly or together.

    A container's quota of CPU time counts as so many cores.
    """
    own: dict[str, set[int]] = {}
    for answer in answers:
        own.setdefault(answer.host, set()).update(answer.value["cores"])
    quotas = {a.host: int(a.value["cpu_quota"] or sys.maxsize) for a in answers}
    cores = {host: min(len(found), quotas[host]) for host, found in own.items()}
    ranks = {answer.host: answer.value["local_size"] for answer in answers}
    short = [a for a in answers if cores[a.host] < a.value["local_size"]]
    shown = [
        f"{host} {_count(cores[host], 'core')} for {_count(ranks[host], 'rank')}"
        for host in (hosts_of(short) or cores)
    ]
    return Finding(
        "cores",
        not short,
        ", ".join(shown[:8]) + (f" and {len(shown) - 8} more hosts" if shown[8:] else ""),
        "a core for each rank",
        "--cpus-per-task, --cpus-per-gpu, --exclusive; mpirun --bind-to none; docker --cpus" if short else "",
        hosts_of(short),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def judge_addresses(answers: Sequence[Answer]) -> list[Finding]:
    """Host names are unique, on which all other checks rely; those of cloned hosts may not be."""
    seen: dict[str, set[tuple[str, ...]]] = {}
    for answer in answers:
        seen.setdefault(answer.host, set()).add(tuple(answer.value))
    return [
        Finding(
            "host names",
            False,
            f"{len(several)} hosts are named {host}: {'; '.join(', '.join(own) for own in sorted(several))}",
            "unique host names",
            "`hostnamectl set-hostname`",
            (host,),
        )
        for host, several in seen.items()
        if len(several) > 1
    ]


def names(table: Mapping[str, Sequence[str]], own: str) -> dict[str, str]:
    """Errors when resolving the names in `table` (host -> addresses) on the host `own`: host -> error."""
    with ThreadPoolExecutor(RESOLVERS) as resolvers:
        errors = resolvers.map(lambda host: _resolution_error(host, table[host], own), table)
        return {host: error for host, error in zip(table, errors, strict=True) if error}


def _resolution_error(host: str, addresses: Sequence[str], own: str) -> str:
    try:
        found = usable({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        return f"does not resolve: {error.strerror or error}"
    beyond = {address for address in found if not is_loopback(address)}
    if beyond <= set(addresses) and (beyond or host in (own, "localhost")):
        return ""  # on its own host it may be 127.0.1.1, as on Debian; horovodrun's name may be `localhost`
    if found and not beyond:
        return f"resolves to the loopback address {', '.join(sorted(found))}"
    return f"resolves to {', '.join(sorted(beyond - set(addresses)))}, which is not its address"


def judge_names(answers: Sequence[Answer]) -> list[Finding]:
    """Each host's name resolves to its address on every host. Reverse lookups are not needed."""
    seen_from: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        for host, error in answer.value.items():
            seen_from.setdefault((host, error), []).append(answer)
    if not seen_from:
        return [Finding("host names", True, f"{', '.join(hosts_of(answers)[:8])}: resolved by every host")]
    return [
        Finding(
            "host names",
            False,
            f"{host} {error}, seen from {', '.join(hosts_of(seen))}",
            "a name that resolves to its host's address",
            f"fix DNS, or /etc/hosts on {', '.join(hosts_of(seen))}",
            (host,),
        )
        for (host, error), seen in seen_from.items()
    ]
