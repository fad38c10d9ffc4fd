"""Which GPU the tasks of srun take. The driver's list of GPUs is made up, what Slurm shows of it is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPUS = Path(__file__).parents[1] / "parallel" / "programs" / "gpus.py"
TWO_NODES = ["--mpi=pmix", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]


def devices(slurm, *options: str) -> list[tuple[str, int, str, str]]:
    """Host, local rank, torch's name for the device and its UUID's number, by rank."""
    said = slurm.run("env", "OWT_TEST_GPUS=2", "srun", *options, sys.executable, GPUS, "devices", "--json")
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    rows = json.loads(line)["devices"]
    return [(row["host"], row["local_rank"], row["device"], row["uuid"][:5]) for row in rows]


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--gpus-per-node=2", ["cuda:0", "cuda:1"]),  # both tasks see both
        ("--gpus-per-task=1", ["cuda:0", "cuda:0"]),  # each sees its own
    ],
)
def test_each_task_of_a_node_takes_a_gpu_of_its_own(slurm, option, names):
    rows = devices(slurm, *TWO_NODES, option)
    hosts = [row[0] for row in rows]
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
    assert [row[1:] for row in rows] == [(0, names[0], "GPU-0"), (1, names[1], "GPU-1")] * 2


def test_nodes_may_have_unequal_numbers_of_tasks(slurm):
    rows = devices(
        slurm, "--mpi=pmix", "--nodes=2", "--ntasks=3", "--distribution=block", "--gpus-per-node=2"
    )
    assert sorted(row[1:] for row in rows) == [(0, "cuda:0", "GPU-0")] * 2 + [(1, "cuda:1", "GPU-1")]


def test_two_tasks_that_see_the_same_gpu_are_refused(slurm):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        devices(slurm, *TWO_NODES, "--gres=gpu:1")
    assert "ranks 0, 1 on host n1 share Tesla K80 GPU-0-n1" in caught.value.stderr
    assert caught.value.stdout.count("GPU-0-n") == 4


def test_tasks_that_do_not_know_of_each_other_are_refused_and_lone_processes_are_not(slurm):
    """Each would be rank 0 of 1. A lone task, and a shell of salloc, may be one."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        slurm.run("srun", "--mpi=none", "--nodes=2", "owt", "train", "/no/data")
    assert caught.value.returncode == 2
    assert caught.value.stderr.count("owt: 2 srun tasks started without PMI; wanted") == 1
    alone = [sys.executable, "-c", "from horovod_owt.topology import rank_topology as r; print(r().launcher)"]
    for start in (["srun", "--ntasks=1"], ["salloc", "--nodes=2", "--ntasks=4"]):
        assert slurm.run(*start, *alone) == "none\n"
