"""The resources of this job, read from its batch process's environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horovod_owt.errors import ConfigError
from horovod_owt.topology import expand_counts


@dataclass(frozen=True)
class Allocation:
    """The job's nodes, and the resources of each."""

    job_id: str  # in squeue's notation: 7, or 7_2 in an array
    hosts: tuple[str, ...]
    ranks_per_node: int
    cpus_per_node: int  # the minimum over all nodes
    restarts: int
    task: str = ""  # of an array: N, of N_TASK
    gpus_by_task: int = 0  # of a node, if they were requested per task

    @property
    def world_size(self) -> int:
        return self.ranks_per_node * len(self.hosts)

    @property
    def cpus_per_rank(self) -> int:
        return max(1, self.cpus_per_node // self.ranks_per_node)

    @property
    def crowded(self) -> bool:
        return self.cpus_per_node < self.ranks_per_node


def read_allocation(env: Mapping[str, str], hosts: Sequence[str]) -> Allocation:
    """The allocation in `env`, on `hosts`: one rank per requested task, else per GPU."""
    task = env.get("SLURM_ARRAY_TASK_ID", "")
    return Allocation(
        # one task of an array has the id of the whole array as its SLURM_JOB_ID
        job_id=f"{env['SLURM_ARRAY_JOB_ID']}_{task}" if task else env["SLURM_JOB_ID"],
        hosts=tuple(hosts),
        ranks_per_node=_ranks_per_node(env, len(hosts)),
        cpus_per_node=min(expand_counts(env["SLURM_JOB_CPUS_PER_NODE"])),
        restarts=int(env.get("SLURM_RESTART_COUNT", 0)),
        task=task,
        gpus_by_task=_gpus_on_node(env) if _are_per_task(env) else 0,
    )


def _are_per_task(env: Mapping[str, str]) -> bool:
    return "SLURM_GPUS_PER_TASK" in env or "gpu" in env.get("SLURM_TRES_PER_TASK", "")


def _gpus_on_node(env: Mapping[str, str]) -> int:
    """The GPUs that the job has on the batch process's node, or the number that was requested; else 0."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):  # 4, a100:4, or a100 for one
        if found := re.search(r"(?:^|:)(\d+)$", env.get(name, "")):
            return int(found[1])
    return 0


def node_list(env: Mapping[str, str]) -> str:
    """The job's nodes in Slurm's notation; raises ConfigError outside a job, and in a heterogeneous one.

    There, Slurm's variables describe the first component only: the nodes of the others would stay idle.
    """
    components = env.get("SLURM_HET_SIZE") or env.get("SLURM_PACK_SIZE", "1")  # PACK before Slurm 20.02
    if components.isdecimal() and int(components) > 1:
        raise ConfigError(
            f"a heterogeneous job of {components} components",
            wanted="one component, with the same number of ranks on each node",
            fix="no `:` in the options of sbatch; or, in a script of your own, "
            "`srun --mpi=pmix --het-group=0,1 owt train DATA`",
        )
    try:
        return env["SLURM_JOB_NODELIST"]
    except KeyError:
        raise ConfigError(
            "no SLURM_JOB_NODELIST in the environment", wanted="a Slurm job", fix="owt job submit DATA"
        ) from None


def _ranks_per_node(env: Mapping[str, str], nodes: int) -> int:
    most = int(env.get("SLURM_NTASKS_PER_NODE", 0))
    tasks = int(env.get("SLURM_NTASKS", 0))
    if most and (not tasks or tasks >= nodes * most):
        return most
    if tasks:  # beside --ntasks, --ntasks-per-node is the most that a node may have
        if tasks % nodes:
            raise ConfigError(
                f"{tasks} tasks on {nodes} nodes",
                wanted="the same number on each",
                fix="--ntasks-per-node N, without --ntasks",
            )
        return tasks // nodes
    return max(1, _gpus_on_node(env))
