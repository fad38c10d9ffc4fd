"""The module that asks the driver, against an NVML that answers as a K80's or an A100's would."""

from types import SimpleNamespace

import pytest
from pynvml import (
    NVML_ERROR_DRIVER_NOT_LOADED,
    NVML_ERROR_FUNCTION_NOT_FOUND,
    NVML_ERROR_GPU_IS_LOST,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    NVML_ERROR_LIBRARY_NOT_FOUND,
    NVML_ERROR_NO_PERMISSION,
    NVML_ERROR_NOT_FOUND,
    NVML_ERROR_NOT_SUPPORTED,
    NVMLError,
)

from horovod_owt.errors import DeviceError
from horovod_owt.parallel import gpus
from horovod_owt.parallel.gpus import Gpu, GpuHealth, list_gpus, read_health


def failing(code):
    def call(*words):
        raise NVMLError(code)

    return call


K80 = {
    "SystemGetDriverVersion": "470.256.02",
    "SystemGetCudaDriverVersion": 11040,
    "DeviceGetCount": 1,
    "DeviceGetHandleByIndex": "handle",
    "DeviceGetUUID": "GPU-1",
    "DeviceGetName": "Tesla K80",
    "DeviceGetPciInfo": SimpleNamespace(domain=0, bus=0x84, device=0),
    "DeviceGetCudaComputeCapability": (3, 7),
    "DeviceGetMemoryInfo": SimpleNamespace(total=12 << 30),
    "DeviceGetMigMode": failing(NVML_ERROR_NOT_SUPPORTED),
    "DeviceGetTotalEccErrors": 2,
    "DeviceGetRemappedRows": failing(NVML_ERROR_NOT_SUPPORTED),
    "DeviceGetRetiredPagesPendingStatus": 1,
    "DeviceGetCurrentClocksEventReasons": failing(NVML_ERROR_FUNCTION_NOT_FOUND),
    "DeviceGetCurrentClocksThrottleReasons": 0x01 | 0x02 | 0x04 | 0x40,
    "DeviceGetPersistenceMode": 0,
    "DeviceGetClockInfo": 562,
    "DeviceGetMaxClockInfo": 875,
    "DeviceGetApplicationsClock": 562,
    "DeviceGetAutoBoostedClocksEnabled": [1, 1],
    "DeviceGetTemperature": 61,
    "DeviceGetCurrPcieLinkGeneration": 1,
    "DeviceGetMaxPcieLinkGeneration": 3,
    "DeviceGetCurrPcieLinkWidth": 8,
    "DeviceGetMaxPcieLinkWidth": 16,
}
A100 = K80 | {
    "DeviceGetPciInfo": SimpleNamespace(domain=0x10000, bus=7, device=0),
    "DeviceGetRemappedRows": (0, 1, 1, 0),
    "DeviceGetRetiredPagesPendingStatus": failing(NVML_ERROR_NOT_SUPPORTED),
    "DeviceGetCurrentClocksEventReasons": 0x00,
    "DeviceGetAutoBoostedClocksEnabled": failing(NVML_ERROR_NOT_SUPPORTED),
    "DeviceGetApplicationsClock": failing(NVML_ERROR_NOT_SUPPORTED),
}


@pytest.fixture
def nvml(monkeypatch):
    """NVML's calls answer with these values, or with what these functions return."""

    def install(**answers):
        opened = []
        answers = {"Init": lambda: opened.append(1), "Shutdown": lambda: opened.pop()} | answers
        for name, answer in answers.items():
            call = answer if callable(answer) else lambda *words, answer=answer: answer
            monkeypatch.setattr(gpus.pynvml, f"nvml{name}", call)
        return opened

    return install


def test_a_gpu_is_described_as_the_driver_reports_it(nvml):
    opened = nvml(**K80)
    assert list_gpus() == [
        Gpu(0, "GPU-1", "Tesla K80", "0000:84:00.0", (3, 7), 12 << 30, "470.256.02", "11.4", ())
    ]
    assert not opened  # whatever was begun is ended


@pytest.mark.parametrize("code", [NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_a_driver_there_are_none(nvml, code):
    nvml(**K80 | {"Init": failing(code)})
    assert list_gpus() == []


def test_a_driver_that_does_not_work_is_no_host_without_gpus(nvml):
    nvml(**K80 | {"Init": failing(NVML_ERROR_LIB_RM_VERSION_MISMATCH)})
    with pytest.raises(DeviceError, match="cannot use the GPUs of host .*version mismatch"):
        list_gpus()


def test_a_lost_gpu_is_named(nvml):
    nvml(**K80 | {"DeviceGetTemperature": failing(NVML_ERROR_GPU_IS_LOST)})
    with pytest.raises(DeviceError, match="cannot use GPU 3 of host .*: GPU is lost"):
        read_health(3)


def test_gpus_come_by_their_address_and_those_of_others_are_left_out(nvml):
    """A control group shows a Slurm job its own; CUDA numbers those that it can use."""
    buses = {0: 0x85, 1: 0x06, 3: 0x05}

    def handle(index):
        return index if index in buses else failing(NVML_ERROR_NO_PERMISSION)()

    def place(handle):
        return SimpleNamespace(domain=0, bus=buses[handle], device=0)

    nvml(**K80 | {"DeviceGetCount": 4, "DeviceGetHandleByIndex": handle, "DeviceGetPciInfo": place})
    seen = [(gpu.index, gpu.pci[5:7]) for gpu in list_gpus()]
    assert seen == [(3, "05"), (1, "06"), (0, "85")]


def test_the_instances_of_a_gpu_in_mig_mode_are_listed(nvml):
    def instance(handle, number):
        return f"instance {number}" if number in (0, 4) else failing(NVML_ERROR_NOT_FOUND)()

    mig = {
        "DeviceGetMigMode": [1, 1],
        "DeviceGetMaxMigDeviceCount": 7,
        "DeviceGetMigDeviceHandleByIndex": instance,
        "DeviceGetUUID": lambda handle: {"handle": "GPU-1"}.get(handle, f"MIG-{handle}"),
    }
    nvml(**A100 | mig)
    (gpu,) = list_gpus()
    assert gpu.mig == ("MIG-instance 0", "MIG-instance 4") and gpu.pci == "10000:07:00.0"
    nvml(**A100 | mig | {"DeviceGetMigMode": [0, 1]})  # only asked for so far
    assert list_gpus()[0].mig == ()


def test_health_of_a_k80(nvml):
    nvml(**K80)
    assert read_health(0) == GpuHealth(
        uncorrected_ecc_errors=2,
        retired_pages_pending=True,
        throttle_reasons=("power cap", "hw thermal slowdown"),
        persistence_mode=False,
        sm_clock_mhz=562,
        max_sm_clock_mhz=875,
        applications_clock_mhz=562,
        auto_boost=True,
        temperature_c=61,
        pcie_generation=1,
        max_pcie_generation=3,
        pcie_width=8,
        max_pcie_width=16,
    )


def test_health_of_an_a100(nvml):
    nvml(**A100)
    health = read_health(0)
    assert (health.retired_pages_pending, health.throttle_reasons) == (True, ())
    assert (health.auto_boost, health.applications_clock_mhz) == (None, None)


def test_what_a_gpu_does_not_say_is_unknown(nvml):
    """As on consumer cards: not supported, one and all."""
    dumb = {name: failing(NVML_ERROR_NOT_SUPPORTED) for name in K80 if name.startswith("DeviceGet")}
    nvml(**dumb | {"DeviceGetHandleByIndex": "handle"})
    assert set(vars(read_health(0)).values()) == {None}
