"""Ranks to devices and cores, with device counts as a launcher and a driver would give them."""

import itertools

import pytest

from horovod_owt.errors import DeviceError
from horovod_owt.parallel.device import assign_device, share_of_cores
from horovod_owt.topology import Topology, read_topology


def rank_of(launcher="horovodrun", *, local_rank=0, local_size=1):
    return Topology(launcher, local_rank, local_size, local_rank, local_size, host="gpu07")


def test_without_a_gpu_a_rank_takes_the_cpu():
    assert assign_device(rank_of(local_size=8), visible=0) == "cpu"


def test_each_rank_of_a_host_takes_the_gpu_of_its_local_rank():
    devices = [assign_device(rank_of(local_rank=r, local_size=4), visible=4) for r in range(4)]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]


def test_a_rank_that_was_shown_one_gpu_of_its_own_takes_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert assign_device(rank_of("mpirun", local_rank=3, local_size=4), visible=1) == "cuda:0"


@pytest.mark.parametrize("visible", [1, 2])
def test_more_ranks_than_gpus_are_refused(monkeypatch, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(DeviceError) as caught:
        assign_device(rank_of(local_rank=0, local_size=3), visible)
    assert caught.value.exit_code == 2
    assert f"3 ranks on host gpu07, where each sees {visible}" in str(caught.value)
    assert f"fix: -np {visible}" in str(caught.value)


@pytest.mark.parametrize(("cores", "ranks"), [(8, 4), (7, 3), (2, 2), (5, 1)])
def test_ranks_share_all_cores_and_none_twice(cores, ranks):
    shares = [share_of_cores(range(cores), rank, ranks) for rank in range(ranks)]
    assert list(itertools.chain(*shares)) == list(range(cores))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_cores_all_use_all():
    assert share_of_cores([0, 1], 2, 3) == [0, 1]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("none", 0, 1, 0, 1)),
        (
            {"HOROVOD_RANK": "5", "HOROVOD_SIZE": "8", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "4"},
            ("horovodrun", 5, 8, 1, 4),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            ("mpirun", 3, 4, 1, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            ("mpiexec", 1, 2, 1, 2),
        ),
    ],
)
def test_the_launchers_word_is_read(env, expected):
    seen = read_topology(env)
    assert (seen.launcher, seen.rank, seen.world_size, seen.local_rank, seen.local_size) == expected
