"""Ranks to cores, on a box of two sockets and two K80 boards that exists in a folder only."""

import itertools
import os

import pytest
from boxes import k80_box, k80_sysfs, rank_of, with_mig, write_device

from horovod_owt.errors import ConfigError
from horovod_owt.parallel import cores, device
from horovod_owt.parallel.cores import cpu_list, numa_node, own_cores, read_cpu_list, share_of_cores
from horovod_owt.parallel.device import CPU, SHARED, claim_device
from horovod_owt.topology import Launcher

ALL = range(40)
SOCKET_0, SOCKET_1 = {*range(10), *range(20, 30)}, {*range(10, 20), *range(30, 40)}


@pytest.fixture
def box(monkeypatch):
    gpus = k80_box()
    monkeypatch.setattr(device, "list_gpus", lambda: gpus)
    return gpus


@pytest.fixture
def sysfs(tmp_path):
    return k80_sysfs(tmp_path)


def cores_of(sysfs, ranks, envs=({},), *, launcher=Launcher.GLOO, allowed=ALL, on_host=40) -> list[str]:
    """Each rank's cores as Linux writes them; `envs` are the ranks' environments, the last for all others."""
    found = []
    for local_rank in range(ranks):
        topology = rank_of(launcher, local_rank=local_rank, local_size=ranks)
        own = claim_device(topology, dict(envs[min(local_rank, len(envs) - 1)]))
        found.append(cpu_list(own_cores(topology, own, allowed, on_host, sysfs)))
    return found


def test_both_halves_of_a_k80_go_to_ranks_of_its_socket(box, sysfs):
    """And each rank has both hyperthreads of its cores."""
    assert cores_of(sysfs, 4) == ["0-4,20-24", "5-9,25-29", "10-14,30-34", "15-19,35-39"]


def test_the_cores_near_a_gpu_are_for_those_ranks_that_have_one_there(box, sysfs):
    assert cores_of(sysfs, 1) == ["0-9,20-29"]
    assert cores_of(sysfs, 3) == ["0-4,20-24", "5-9,25-29", "10-19,30-39"]
    assert cores_of(sysfs, 2, [{"CUDA_VISIBLE_DEVICES": "3,0"}]) == ["10-19,30-39", "0-9,20-29"]


def test_a_rank_that_sees_its_own_gpu_alone_leaves_cores_to_the_others(box, sysfs):
    """srun --gpus-per-task=1."""
    envs = [{"CUDA_VISIBLE_DEVICES": str(number)} for number in range(4)]
    assert cores_of(sysfs, 4, envs, launcher=Launcher.PMIX) == cores_of(sysfs, 4)
    turned = cores_of(sysfs, 4, envs[::-1], launcher=Launcher.PMIX)
    assert turned == cores_of(sysfs, 4)[::-1]


def test_ranks_on_one_gpu_share_its_cores(box, sysfs):
    del box[1:]
    assert cores_of(sysfs, 2, [{SHARED: "1"}]) == ["0-4,20-24", "5-9,25-29"]
    box[0] = with_mig(box[0], 2)
    assert cores_of(sysfs, 2) == ["0-4,20-24", "5-9,25-29"]


@pytest.mark.parametrize("launcher", [Launcher.MPIRUN, Launcher.PMIX])
def test_a_rank_that_its_launcher_bound_keeps_what_is_near_its_gpu(box, sysfs, launcher):
    bound = {"launcher": launcher, "allowed": range(5, 15)}
    assert cores_of(sysfs, 4, **bound) == ["5-9", "5-9", "10-14", "10-14"]
    # far from its GPU: better there than nowhere
    assert cores_of(sysfs, 4, launcher=launcher, allowed=range(10, 15))[0] == "10-14"


def test_ranks_of_horovodrun_share_what_it_may_use(box, sysfs):
    assert cores_of(sysfs, 4, allowed=range(4, 16)) == ["4-6", "7-9", "10-12", "13-15"]


@pytest.mark.parametrize("spoil", ["no sysfs", "no such device"])
def test_where_sysfs_does_not_say_ranks_share_all_cores(box, sysfs, tmp_path, spoil):
    if spoil == "no sysfs":
        sysfs = tmp_path / "nowhere"
    else:
        for gpu in box:
            (sysfs / "bus/pci/devices" / gpu.pci / "local_cpulist").unlink()
    parts = [read_cpu_list_of(text) for text in cores_of(sysfs, 4)]
    assert sorted(itertools.chain(*parts)) == list(ALL) and {len(part) for part in parts} == {10}


def read_cpu_list_of(text: str) -> list[int]:
    return [
        cpu
        for part in text.split(",")
        for cpu in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]


def test_cpu_ranks_share_all_cores_by_whole_ones(sysfs):
    shares = [own_cores(rank_of(local_rank=r, local_size=2), CPU, ALL, 40, sysfs) for r in range(2)]
    assert [set(share) for share in shares] == [SOCKET_0, SOCKET_1]


def test_cpu_ranks_that_mpirun_bound_stay_there(sysfs):
    bound = rank_of("mpirun", local_rank=1, local_size=2)
    assert own_cores(bound, CPU, [3, 5], 40, sysfs) == [3, 5]
    assert own_cores(bound, CPU, [3, 5], 2, sysfs) == [5]  # those are all of the host's


@pytest.mark.parametrize("launcher", [Launcher.MPIRUN, Launcher.PMIX])
def test_ranks_that_were_left_unbound_share_the_cores_of_their_step(sysfs, launcher):
    """A cgroup of Slurm's, or a container's, has fewer cores than the host."""
    ranks = [rank_of(launcher, local_rank=rank, local_size=2, unbound=True) for rank in range(2)]
    assert [own_cores(rank, CPU, range(4, 8), 40, sysfs) for rank in ranks] == [[4, 5], [6, 7]]


@pytest.mark.parametrize(("cores", "ranks"), [(8, 4), (7, 3), (2, 2), (5, 1)])
def test_ranks_share_all_cores_and_none_twice(cores, ranks):
    shares = [share_of_cores(range(cores), rank, ranks) for rank in range(ranks)]
    assert list(itertools.chain(*shares)) == list(range(cores))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_cores_all_use_all():
    assert share_of_cores([0, 1], 2, 3) == [0, 1]


@pytest.mark.parametrize(("threads", "expected"), [(None, 20), ("", 20), ("3", 3), ("4,2", 4)])
def test_a_rank_goes_to_its_cores_with_a_thread_on_each(box, sysfs, monkeypatch, threads, expected):
    gone_to = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(ALL))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: gone_to.append(set(cpus)))
    monkeypatch.setattr(os, "cpu_count", lambda: 40)
    monkeypatch.setattr(cores, "SYSFS", sysfs)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    topology = rank_of(local_rank=0, local_size=2)
    own = claim_device(topology, {"CUDA_VISIBLE_DEVICES": "0,2"})
    assert cores.use_own_cores(topology, own) == expected
    assert gone_to == [SOCKET_0]


@pytest.mark.parametrize("threads", ["0", "all", "-1", ",2", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(box, sysfs, monkeypatch, threads):
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
    monkeypatch.setattr(cores, "SYSFS", sysfs)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with pytest.raises(
        ConfigError, match=f"^OMP_NUM_THREADS={threads}; wanted a positive number; fix: unset"
    ):
        cores.use_own_cores(rank_of(local_rank=0, local_size=2), CPU)


def test_the_memory_node_is_the_devices_or_unknown(sysfs):
    write_device(sysfs, "0000:99:00.0", "0x10de", "0x030000", "0-39", -1)
    nodes = [numa_node(pci, sysfs) for pci in ("0000:84:00.0", "0000:99:00.0", "0000:aa:00.0")]
    assert nodes == [1, None, None]


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8,10-11\n", [0, 1, 2, 3, 8, 10, 11]), ("\n", []), ("7", [7])]
)
def test_lists_of_cpus_are_linuxs(tmp_path, text, cpus):
    (tmp_path / "list").write_text(text)
    assert read_cpu_list(tmp_path / "list") == cpus
    assert cpu_list(cpus) == text.strip()
