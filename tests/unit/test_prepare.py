"""What is settled, or refused, before ranks meet."""

import os

import pytest
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError, DeviceError
from horovod_owt.parallel import runtime
from horovod_owt.parallel.device import Device
from horovod_owt.parallel.gpus import Gpu
from horovod_owt.topology import Launcher, Topology
from horovod_owt.train import prepare
from horovod_owt.train.prepare import choose_device, prepare_request


@pytest.fixture
def on_a_host_of_two_in_a_job_of_three(monkeypatch):
    place = {"RANK": 0, "SIZE": 3, "LOCAL_RANK": 0, "LOCAL_SIZE": 2, "HOSTNAME": "gpu01"}
    for name, value in place.items():
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))


@pytest.fixture
def images(tmp_path):
    write_synthetic(tmp_path / "data", classes=2, train_per_class=1, val_per_class=1, size=(64, 64))
    return tmp_path / "data"


def test_data_parallel_needs_no_whole_groups(on_a_host_of_two_in_a_job_of_three, images):
    cfg = prepare_request(images, None, ("parallel=data",)).cfg
    assert cfg.ranks_per_classifier() == 1 and cfg.fc_group_size == 1
    assert cfg.classes == 2


def test_hybrid_is_refused_where_hosts_make_no_whole_groups(on_a_host_of_two_in_a_job_of_three, images):
    with pytest.raises(ConfigError, match=r"fc_group_size=node \(2 ranks on gpu01\) in a job of 3 ranks"):
        prepare_request(images, None, ("parallel=hybrid",))


def test_hybrid_knows_its_group_before_ranks_meet(on_a_host_of_two_in_a_job_of_three, images):
    cfg = prepare_request(images, None, ("parallel=hybrid", "fc_group_size=all")).cfg
    assert cfg.fc_group_size == 3


ALONE = Topology(Launcher.NONE, 0, 1, 0, 1, "gpu01")


@pytest.fixture
def on_a(monkeypatch):
    """A rank whose GPU, torch and Horovod are as told."""

    def box(name, capability, *, architectures=("sm_75", "sm_80", "sm_90"), nccl=23007, starts=True):
        gpu = Gpu(0, "GPU-1", name, "0000:05:00.0", capability, 80 << 30, "580.65.06", "13.0")
        monkeypatch.setattr(prepare, "claim_device", lambda topology: Device("cuda:0", gpu))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: starts)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(runtime, "nccl_version", lambda: nccl)

    monkeypatch.setattr(os, "environ", os.environ.copy())
    return box


def choose(**settings) -> Device:
    return choose_device(TrainConfig(**settings), ALONE)


def test_a_horovod_without_nccl_is_refused_where_there_is_a_gpu(on_a):
    on_a("NVIDIA H100", (9, 0), nccl=0)
    with pytest.raises(DeviceError, match="Horovod on host gpu01 is built without NCCL") as caught:
        choose()
    assert "launch/setup" in caught.value.fix


@pytest.mark.parametrize(
    ("gpu", "capability", "architectures", "precision", "fix"),
    [
        ("Tesla V100", (7, 0), ("sm_70", "sm_80"), "bf16", "--set precision=fp16"),
        ("Tesla K80", (3, 7), ("sm_37",), "bf16", "--set precision=fp32"),
        ("Tesla K80", (3, 7), ("sm_37",), "fp16", "--set precision=fp32"),
    ],
)
def test_a_precision_that_the_gpu_lacks_is_refused(on_a, gpu, capability, architectures, precision, fix):
    on_a(gpu, capability, architectures=architectures)
    with pytest.raises(ConfigError, match=f"precision={precision} on {gpu}") as caught:
        choose(precision=precision)
    assert caught.value.fix == fix
    assert choose(precision=fix.partition("precision=")[2]).name == "cuda:0"


def test_a_gpu_that_torch_has_no_code_for_is_refused(on_a):
    on_a("Tesla V100", (7, 0))
    with pytest.raises(DeviceError, match="sm_70, torch is built for sm_75 sm_80 sm_90"):
        choose()


def test_a_cuda_that_does_not_start_is_not_called_a_wrong_torch(on_a, monkeypatch):
    """Eight GPUs with NVSwitch and without its service."""

    def init():
        raise RuntimeError(
            "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
            "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized"
        )

    on_a("NVIDIA H100", (9, 0), starts=False, architectures=())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(DeviceError, match="driver 580.65.06: Error 802: system not yet ini") as caught:
        choose()
    assert "nvidia-fabricmanager" in caught.value.fix and "launch/setup" not in caught.value.fix
    monkeypatch.setattr(torch.version, "cuda", "14.1")
    with pytest.raises(DeviceError, match="for CUDA 14.1, driver 580.65.06 supports up to CUDA 13.0"):
        choose()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_current_gpu_takes_every_precision(on_a, precision):
    on_a("NVIDIA H100", (9, 0))
    assert choose(precision=precision).name == "cuda:0"


def test_deterministic_runs_get_cublas_workspace_unless_the_user_chose_one(on_a):
    on_a("NVIDIA H100", (9, 0))
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    choose()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    choose(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    choose(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
