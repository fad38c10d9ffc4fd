"""This host's GPUs as reported by NVML. The only module that queries the driver.

NVML needs neither torch nor CUDA, allocates no GPU memory and ignores CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

from horovod_owt.errors import DeviceError

NO_GPU = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
NOT_REPORTED = (  # by this GPU or this version of the driver
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_DEPRECATED,
)
# Reasons for reduced clocks that are problems. Idle, user-set clocks and a display are not.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hw slowdown",  # either kind below, or a drop of the supply voltage
    0x20: "thermal slowdown",
    0x40: "hw thermal slowdown",
    0x80: "hw power brake",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU of this host; a K80 board is two."""

    index: int  # NVML's number
    uuid: str  # GPU-...
    name: str
    pci: str  # sysfs notation: 0000:05:00.0
    compute_capability: tuple[int, int]
    memory_bytes: int | None  # None where it shares host memory
    driver: str  # 470.256.02
    cuda_driver: str  # newest CUDA version that the driver supports: 11.4
    mig: tuple[str, ...] = ()  # UUIDs of its instances, in MIG mode


@dataclass(frozen=True)
class GpuHealth:
    """A GPU's current state; None for what the GPU or its driver does not report."""

    uncorrected_ecc_errors: int | None  # since the driver was loaded
    retired_pages_pending: bool | None  # pages or rows that the next reset retires
    throttle_reasons: tuple[str, ...] | None  # values of THROTTLE_REASONS; empty: full speed
    persistence_mode: bool | None
    sm_clock_mhz: int | None
    max_sm_clock_mhz: int | None
    applications_clock_mhz: int | None  # SM clock set by an administrator
    auto_boost: bool | None
    temperature_c: int | None
    pcie_generation: int | None  # current; an idle GPU may slow down its link
    max_pcie_generation: int | None  # supported by both GPU and slot
    pcie_width: int | None  # lanes
    max_pcie_width: int | None


def list_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in PCI order; empty without a driver.

    Raises DeviceError if there is a driver but it does not work: training on this host's CPU cores instead
    would slow down the whole job.
    """
    try:
        with _nvml():
            handles = map(_handle, range(pynvml.nvmlDeviceGetCount()))
            gpus = [_gpu(index, handle) for index, handle in enumerate(handles) if handle is not None]
    except pynvml.NVMLError as error:
        if error.value in NO_GPU:
            return []
        raise _driver_error("the GPUs", error) from None
    return sorted(gpus, key=lambda gpu: gpu.pci)


def read_health(index: int) -> GpuHealth:
    """The state of NVML's GPU `index`; DeviceError if it is lost."""
    try:
        with _nvml():
            return _health(pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as error:
        raise _driver_error(f"GPU {index}", error) from None


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _handle(index: int):
    """None for a GPU that a cgroup hides from this process: CUDA does not number it."""
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
            return None
        raise


def _gpu(index: int, handle) -> Gpu:
    place = pynvml.nvmlDeviceGetPciInfo(handle)
    memory = _query(pynvml.nvmlDeviceGetMemoryInfo, handle)
    newest_cuda = pynvml.nvmlSystemGetCudaDriverVersion()  # 11040
    return Gpu(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        pci=f"{place.domain:04x}:{place.bus:02x}:{place.device:02x}.0",
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        memory_bytes=memory and memory.total,
        driver=pynvml.nvmlSystemGetDriverVersion(),
        cuda_driver=f"{newest_cuda // 1000}.{newest_cuda % 1000 // 10}",
        mig=tuple(_instances(handle)),
    )


def _instances(handle) -> Iterator[str]:
    """UUIDs of a GPU's MIG instances; old drivers format them MIG-GPU-.../GPU INSTANCE/COMPUTE INSTANCE."""
    mode_and_pending = _query(pynvml.nvmlDeviceGetMigMode, handle)
    if not (mode_and_pending and mode_and_pending[0]):
        return
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except pynvml.NVMLError as error:
            if error.value not in (pynvml.NVML_ERROR_NOT_FOUND, *NOT_REPORTED):
                raise


def _health(handle) -> GpuHealth:
    sm = pynvml.NVML_CLOCK_SM
    boosted = _query(pynvml.nvmlDeviceGetAutoBoostedClocksEnabled, handle)
    return GpuHealth(
        uncorrected_ecc_errors=_query(
            pynvml.nvmlDeviceGetTotalEccErrors,
            handle,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        ),
        retired_pages_pending=_pages_pending(handle),
        throttle_reasons=_throttle_reasons(handle),
        persistence_mode=_flag(_query(pynvml.nvmlDeviceGetPersistenceMode, handle)),
        sm_clock_mhz=_query(pynvml.nvmlDeviceGetClockInfo, handle, sm),
        max_sm_clock_mhz=_query(pynvml.nvmlDeviceGetMaxClockInfo, handle, sm),
        applications_clock_mhz=_query(pynvml.nvmlDeviceGetApplicationsClock, handle, sm),
        auto_boost=_flag(boosted and boosted[0]),
        temperature_c=_query(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        pcie_generation=_query(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        max_pcie_generation=_query(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_width=_query(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        max_pcie_width=_query(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
    )


def _pages_pending(handle) -> bool | None:
    """GPUs up to Volta retire pages; from Ampere on they remap rows and do not support page retirement."""
    rows = _query(pynvml.nvmlDeviceGetRemappedRows, handle)  # corrected, uncorrected, pending, failed
    if rows is not None:
        return bool(rows[2])
    return _flag(_query(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, handle))


def _throttle_reasons(handle) -> tuple[str, ...] | None:
    bits = _query(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)  # its name since driver 535
    if bits is None:
        bits = _query(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    if bits is None:
        return None
    return tuple(name for bit, name in THROTTLE_REASONS.items() if bits & bit)


def _query(function: Callable[..., Any], *args: Any) -> Any:
    """The function's value; None if this GPU or its driver does not report it."""
    try:
        return function(*args)
    except pynvml.NVMLError as error:
        if error.value in NOT_REPORTED:
            return None
        raise


def _flag(state: int | None) -> bool | None:
    return None if state is None else bool(state)


def _driver_error(what: str, error: pynvml.NVMLError) -> DeviceError:
    return DeviceError(
        f"the driver cannot use {what} of host {socket.gethostname()}: {error}",
        wanted="a working driver",
        fix="run `nvidia-smi` there; reboot after a driver update; "
        "set CUDA_VISIBLE_DEVICES= (empty) to train on CPU cores",
    )
