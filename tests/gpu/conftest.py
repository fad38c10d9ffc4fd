"""Tests that need a GPU, and the report of what they saw: build/gpu-report, or $OWT_GPU_REPORT."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; for the deterministic runs

from gpu_report import GpuReport  # noqa: E402

from horovod_owt.parallel.gpus import list_gpus  # noqa: E402
from horovod_owt.versions import installed_versions  # noqa: E402

REPORT = GpuReport()


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def report() -> GpuReport:
    return REPORT


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    return device


def pytest_runtest_logreport(report):
    if "tests/gpu/" not in report.nodeid or not torch.cuda.is_available():
        return
    name = report.nodeid.rpartition("::")[2]
    if report.when == "call" or report.outcome != "passed":
        why = f": {report.longrepr[2]}" if report.skipped and isinstance(report.longrepr, tuple) else ""
        REPORT.results[name] = report.outcome + why
        REPORT.seconds[name] = report.duration


def pytest_sessionfinish():
    if not REPORT.results or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    gpus = list_gpus()
    REPORT.machine = {
        "gpus": len(gpus),
        "gpu": gpus[0].name if gpus else torch.cuda.get_device_name(),
        "mig": bool(gpus and gpus[0].mig),
        "driver": gpus[0].driver if gpus else "",
        "cuda": torch.version.cuda,
        **installed_versions(),
    }
    REPORT.write(Path(os.environ.get("OWT_GPU_REPORT", "build/gpu-report")))
