"""The variables that Horovod and NCCL are started with."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
from horovod.common.exceptions import HorovodInternalError

from horovod_owt.errors import ConfigError, PrintedBy
from horovod_owt.parallel import runtime
from horovod_owt.parallel.device import Device
from horovod_owt.parallel.gpus import Gpu
from horovod_owt.parallel.runtime import _background_thread_sleep, _nccl_on_shared_device
from horovod_owt.topology import Launcher, Topology

RANK_3 = Topology(Launcher.GLOO, 3, 4, 1, 2, "gpu01")
H100 = Gpu(0, "GPU-1", "NVIDIA H100", "0000:05:00.0", (9, 0), 80 << 30, "580.65.06", "13.0")


@pytest.mark.parametrize(
    ("controller", "fc_group_size", "on_gpu", "expected"),
    [
        ("gloo", 1, True, {"HOROVOD_CYCLE_TIME": "0.1", "HOROVOD_IDLE_CYCLE_TIME": "100"}),
        ("gloo", 2, True, {"HOROVOD_CYCLE_TIME": "0.1"}),
        ("mpi", 1, True, {"HOROVOD_CYCLE_TIME": "0.1"}),
        ("gloo", 1, False, {"HOROVOD_IDLE_CYCLE_TIME": "100"}),
        ("gloo", 4, False, {"HOROVOD_IDLE_CYCLE_TIME": "100"}),
        ("mpi", 1, False, {"HOROVOD_CYCLE_TIME": "5"}),
    ],
)
def test_with_a_gpu_tensors_do_not_wait_for_the_next_poll(
    monkeypatch, controller, fc_group_size, on_gpu, expected
):
    monkeypatch.setenv("HOROVOD_CONTROLLER", controller)
    assert _background_thread_sleep(4, fc_group_size, on_gpu=on_gpu) == expected


@pytest.mark.parametrize(
    ("device", "env", "nccl", "expected"),
    [
        (Device("cuda:0", H100), {}, 23007, {}),
        (Device("cuda:0", H100), {"HOROVOD_OWT_SHARED_DEVICES": "0"}, 23007, {}),
        (
            Device("cuda:0", H100),
            {"HOROVOD_OWT_SHARED_DEVICES": "1"},
            23007,
            {"NCCL_MULTI_RANK_GPU_ENABLE": "1"},
        ),
        (Device("cuda:0", H100), {"HOROVOD_OWT_SHARED_DEVICES": "1"}, 21403, {"NCCL_HOSTID": "gpu01-3"}),
        (Device("cuda:0", H100, "MIG-7"), {}, 22703, {"NCCL_HOSTID": "gpu01-3"}),
    ],
)
def test_nccl_is_told_of_shared_devices(device, env, nccl, expected):
    assert _nccl_on_shared_device(device, RANK_3, nccl, env) == expected


def test_a_rank_that_is_done_leaves_although_another_one_died(monkeypatch):
    left = []

    def barrier():
        raise HorovodInternalError("Horovod has been shut down")

    monkeypatch.setattr(runtime.hvd, "barrier", barrier)
    monkeypatch.setattr(runtime.hvd, "shutdown", lambda: left.append(True))
    runtime.shutdown()
    assert left


@pytest.mark.parametrize(
    ("launcher", "elastic", "message"),
    [
        (Launcher.GLOO, "", "HOROVOD_RANK=3 HOROVOD_SIZE=4, but Horovod sees 1; .*unset HOROVOD_RANK"),
        (Launcher.MPIRUN, "", "mpirun started 4 ranks, Horovod's MPI sees 1"),
        (Launcher.GLOO, "1", ""),
        (Launcher.NONE, "", ""),
    ],
)
def test_ranks_that_horovod_does_not_see_are_refused(monkeypatch, launcher, elastic, message):
    monkeypatch.setattr(runtime.hvd, "size", lambda: 1)
    monkeypatch.setenv("HOROVOD_ELASTIC", elastic)
    seen = replace(RANK_3, launcher=launcher)
    with pytest.raises(ConfigError, match=message) if message else nullcontext() as caught:
        runtime._check_size(seen)
    if message:  # a process with left variables is alone, whatever rank they name
        assert caught.value.printed_by is not PrintedBy.RANK_0
