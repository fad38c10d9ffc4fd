"""Second stage: figures for the report. Only what is plainly broken fails."""

import json
from statistics import median
from time import perf_counter, process_time

import numpy as np
import pytest
import torch
from gpu_steps import alone, make_replica, random_batch
from test_gpu_correctness import needs_nccl, run_ranks

from horovod_owt.bench.ddp_loop import DdpLoop
from horovod_owt.data.feed import TrainFeed
from horovod_owt.data.nvjpeg import nvjpeg_decoder
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.train import state

pytestmark = [pytest.mark.timeout(300), pytest.mark.alone]

IMAGENET = dict(classes=1000, image_size=224)


def step_ms(step, *, warmup: int = 10, steps: int = 30) -> float:
    """Wall time of a step in a row of steps: they overlap as in training."""
    for number in range(warmup):
        step(number)
    torch.cuda.synchronize()
    start = perf_counter()
    for number in range(steps):
        step(warmup + number)
    torch.cuda.synchronize()
    return 1e3 * (perf_counter() - start) / steps


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [128, 256, 512])
def test_step(gpu, report, batch, precision):
    """Beside the same net in plain torch, with its own options for speed and without Horovod."""
    replica = make_replica(gpu, batch=batch, precision=precision, **IMAGENET)
    fixed = random_batch(replica.cfg, gpu, 0)
    torch.cuda.reset_peak_memory_stats()
    ours = step_ms(lambda step: replica.train_step(lambda: fixed, consumed=step * batch, lr=1e-4))
    row = dict(batch=batch, precision=precision, ours_ms=ours, images_per_s=1e3 * batch / ours)
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if precision != "fp16":
        plain = DdpLoop(replica.cfg, alone(gpu), fixed, tuned=True)
        row["torch_ms"] = step_ms(plain.train_step)
        row["torch_images_per_s"] = 1e3 * batch / row["torch_ms"]
    report.add_row("a step, 224 px, 1000 classes", **row)


def test_kernels_and_idle_time_of_a_step(gpu, report):
    replica = make_replica(gpu, batch=256, precision="bf16", **IMAGENET)
    fixed = random_batch(replica.cfg, gpu, 0)
    step = lambda number: replica.train_step(lambda: fixed, consumed=number, lr=1e-4)  # noqa: E731
    wall_ms = step_ms(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number in range(5):
            step(number)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    busy_ms = sum(event.time_range.elapsed_us() for event in kernels) / 5e3
    report.add_row(
        "a bf16 step of 256 images", wall_ms=wall_ms, gpu_busy_ms=busy_ms, kernels_and_copies=len(kernels) / 5
    )


@needs_nccl
@pytest.mark.parametrize("cycle_ms", ["1", "0.1", ""])
def test_latency_of_a_small_sum(report, tmp_path, cycle_ms):
    env = {"HOROVOD_CYCLE_TIME": cycle_ms} if cycle_ms else {}
    run_ranks(2, tmp_path / "ranks", dict(batch=4), **env)
    times_ms = json.loads((tmp_path / "ranks" / "sum_ms.json").read_text())
    report.add_row("a sum of 64 numbers, 2 ranks", cycle_ms=cycle_ms or "ours", median_ms=median(times_ms))


def test_nvjpeg_images_per_second(gpu, report, tmp_path):
    decode = nvjpeg_decoder(gpu)
    if decode is None:
        pytest.skip("this torchvision has no nvJPEG")
    write_synthetic(tmp_path / "data", classes=2, train_per_class=1, val_per_class=32, size=(375, 500))
    files = [np.fromfile(path, np.uint8) for path in (tmp_path / "data" / "val").rglob("*.JPEG")] * 4
    tensors = [torch.from_numpy(file) for file in files]
    ms = step_ms(lambda step: decode(tensors), warmup=2, steps=5)
    report.add_row("nvJPEG", images_per_s=1e3 * len(tensors) / ms)


def test_dali_decodes_on_the_gpu(gpu, report, tmp_path):
    """Where DALI decodes on the CPU instead, silently or with warnings, an image costs as much CPU time as
    there."""
    pytest.importorskip("nvidia.dali")
    write_synthetic(tmp_path / "data", classes=2, train_per_class=256, val_per_class=1, size=(375, 500))
    store, cpu_ms = open_data_set(tmp_path / "data").train, {}
    for place, device_id in (("GPU", gpu.index), ("CPU", None)):
        feed = TrainFeed(store, seed=1, batch=128)
        how = dict(image_size=224, device_id=device_id, num_threads=4)
        with make_pipeline("dali", feed, **how) as batches:
            for _ in range(8):  # those that are ready by now
                next(batches)
            cpu_s = process_time()
            ms = step_ms(lambda step: next(batches), warmup=0, steps=20)
            cpu_ms[place] = 1e3 * (process_time() - cpu_s) / (20 * 128)
        report.add_row(
            "DALI, 375 x 500 px", decodes_on=place, images_per_s=128e3 / ms, cpu_ms_per_image=cpu_ms[place]
        )
    assert cpu_ms["GPU"] < 0.6 * cpu_ms["CPU"]


@pytest.mark.parametrize("pinned", [False, True])
def test_copies_to_the_gpu(gpu, report, pinned):
    images = torch.empty(256, 224, 224, 3, dtype=torch.uint8, pin_memory=pinned)
    ms = step_ms(lambda step: images.to(gpu, non_blocking=True))
    report.add_row(
        "256 images of 8 bits to the GPU", pinned=pinned, ms=ms, gb_per_s=images.numel() / ms / 1e6
    )


def test_stall_of_a_checkpoint(gpu, report, monkeypatch):
    monkeypatch.setattr(state.runtime, "versions", dict)
    replica = make_replica(gpu, **IMAGENET)
    copies, times = state.allocate_snapshot(replica), []
    for _ in range(5):
        torch.cuda.synchronize()
        start = perf_counter()
        state.snapshot(replica, state.Position(100), copies, validation_due=False)
        times.append(1e3 * (perf_counter() - start))
    report.add_row("a checkpoint's stall", median_ms=median(times))
    assert median(times) < 2000
