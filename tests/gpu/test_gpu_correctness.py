"""First stage: the GPU computes what the CPU computes, waits where it should, and NCCL does its part."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from gpu_steps import (
    largest_difference,
    make_replica,
    random_batch,
    train,
    update_difference,
    weights,
)
from PIL import Image
from safetensors.torch import load_file

from horovod_owt.data.feed import ValidationFeed
from horovod_owt.data.nvjpeg import nvjpeg_decoder
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.model import dropout
from horovod_owt.parallel.runtime import nccl_version
from horovod_owt.train import state

pytestmark = pytest.mark.timeout(200)

CPU = torch.device("cpu")
SHARED_GPU = Path(__file__).parent / "programs" / "shared_gpu.py"
needs_nccl = pytest.mark.skipif(not nccl_version(), reason="this Horovod has no NCCL")


@pytest.mark.parametrize("model", ["alexnet-owt", "alexnet-owt-bn"])
@pytest.mark.parametrize(("precision", "limit"), [("fp64", 1e-9), ("fp32", 0.01), ("bf16", 0.15)])
def test_three_steps_train_to_the_cpus_weights(gpu, report, model, precision, limit):
    """On an H200, TF32 in place of fp32 differs by 0.02 and more, fp32 by 0.008 at most."""
    made = [make_replica(device, model=model, precision=precision) for device in (CPU, gpu)]
    before = weights(made[0])
    losses = [train(each, 3) for each in made]
    difference = update_difference(before, *map(weights, made))
    report.add_row("GPU against CPU, three steps", model=model, precision=precision, difference=difference)
    assert difference < limit and losses[1] == pytest.approx(losses[0], rel=limit)


def test_dropout_is_one_kernel_here(gpu):
    assert dropout.fused_kernel(gpu) is not None
    keys = [dropout.keys_on(device, 3, np.arange(50)) for device in (CPU, gpu)]
    on_cpu, on_gpu = (dropout.keep_scale(each, 1, range(10, 500), 0.4).cpu() for each in keys)
    assert torch.equal(on_cpu, on_gpu)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"precision": "bf16", "clip_norm": 1.0}])
def test_torch_sees_no_wait_in_a_step(gpu, settings):
    """Its debug mode does not count waits for an event, of which a step has one."""
    replica = make_replica(gpu, **settings)
    batch = random_batch(replica.cfg, gpu, 0)
    step = lambda: replica.train_step(lambda: batch, consumed=0, lr=0.01)  # noqa: E731
    step(), step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_that_is_not_finite_changes_no_weight(gpu):
    replica = make_replica(gpu)
    train(replica, 1)
    before, batch = weights(replica), random_batch(replica.cfg, gpu, 1)
    batch.images[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        replica.train_step(lambda: batch, consumed=0, lr=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(replica).items())


def test_an_overflow_in_fp16_skips_the_update_and_halves_the_scale(gpu):
    replica = make_replica(gpu, precision="fp16")
    train(replica, 1)
    replica.load_scaler_state(replica.scaler_state() | {"scale": 2.0**40})
    before = weights(replica)
    train(replica, 1)
    assert replica.scaler_state()["scale"] == 2.0**39
    assert largest_difference(before, weights(replica)) == 0


def test_deterministic_runs_are_equal_bit_by_bit(gpu):
    made = [make_replica(gpu, deterministic=True) for _ in range(2)]
    for each in made:
        train(each, 3)
    torch.use_deterministic_algorithms(False)
    assert largest_difference(*map(weights, made)) == 0


def test_a_checkpoint_goes_from_gpu_to_cpu_and_back(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(state, "on_root", lambda action, name: action())
    monkeypatch.setattr(state, "broadcast_tensor", lambda tensor, name: tensor)
    monkeypatch.setattr(state.runtime, "versions", dict)
    replica = make_replica(gpu)
    train(replica, 2)
    for device in (CPU, gpu):
        saved = state.snapshot(
            replica, state.Position(100), state.allocate_snapshot(replica), validation_due=False
        )
        monkeypatch.setattr(state, "read_checkpoint", lambda path, saved=saved: saved)
        resumed = make_replica(device, seed=1)
        state.restore(resumed, state.Position(100), tmp_path, tmp_path)
        assert largest_difference(weights(replica), weights(resumed)) == 0
        replica = resumed


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    """JPEGs, and among them what nvJPEG is not to decode: a PNG by another name, CMYK, and RGB."""
    root = tmp_path_factory.mktemp("images") / "data"
    write_synthetic(root, classes=2, train_per_class=1, val_per_class=8, size=(200, 300))
    files = sorted((root / "val").rglob("*.JPEG"))
    odd = (("RGB", "PNG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"keep_rgb": True}))
    for file, (mode, kind, options) in zip(files, odd, strict=False):
        out = io.BytesIO()
        Image.open(file).convert(mode).save(out, kind, **options)
        file.write_bytes(out.getvalue())
    return open_data_set(root)


@pytest.mark.parametrize("pipeline", ["torchvision", "dali"])
def test_a_gpu_decodes_what_the_cpu_decodes(gpu, report, odd_images, pipeline):
    if pipeline == "torchvision" and nvjpeg_decoder(gpu) is None:
        pytest.skip("this torchvision has no nvJPEG")
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")

    def batch_on(device_id):
        feed = ValidationFeed(odd_images.val, batch=16)
        with make_pipeline(pipeline, feed, image_size=128, device_id=device_id, num_threads=2) as pipe:
            return next(pipe)

    on_gpu, on_cpu = batch_on(0), batch_on(None)
    difference = (on_gpu.images.cpu() - on_cpu.images).abs().flatten(1).mean(dim=1)
    report.add_row(
        "GPU's decoder against the CPU's, mean difference of normalised pixels",
        pipeline=pipeline,
        worst_image=difference.max().item(),
    )
    assert not on_gpu.faults and difference.max() < 0.1


def start_ranks(ranks: int, out: Path, settings: dict, steps: int = 3, **env: str) -> subprocess.Popen:
    out.mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "NCCL_"))}
    clean |= {"NCCL_SOCKET_IFNAME": "=lo", "NCCL_IB_DISABLE": "1", "HOROVOD_OWT_SHARED_DEVICES": "1", **env}
    launcher = [Path(sys.executable).with_name("horovodrun"), "--gloo", "-np", str(ranks)]
    program = [sys.executable, SHARED_GPU, out, json.dumps(settings), str(steps)]
    output = (out / "output.txt").open("w")
    return subprocess.Popen(
        [*map(str, launcher + program)], env=clean, stdout=output, stderr=output, start_new_session=True
    )


def run_ranks(ranks: int, out: Path, settings: dict, **env: str) -> dict[str, torch.Tensor]:
    job = start_ranks(ranks, out, settings, **env)
    try:
        assert job.wait(120) == 0, (out / "output.txt").read_text()[-3000:]
    finally:
        end(job)
    return load_file(out / "weights.safetensors")


def end(job: subprocess.Popen) -> None:
    try:
        family = psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        process.kill()
    job.kill()
    job.wait()


STRATEGIES = {
    "data": {},
    "hybrid a": dict(parallel="hybrid", owt_scheme="a"),
    "hybrid b": dict(parallel="hybrid", owt_scheme="b"),
}


@needs_nccl
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_over_nccl_train_to_the_weights_of_one_process(gpu, report, tmp_path, ranks, strategy):
    settings = dict(batch=16 // ranks, precision="fp64", fc_group_size=2 if STRATEGIES[strategy] else 1)
    together = run_ranks(ranks, tmp_path / "ranks", settings | STRATEGIES[strategy], NCCL_MAX_CTAS="4")
    one = make_replica(gpu, precision="fp64", stall_limit_s=20)
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        pictures, labels = (
            torch.randn(16, 3, 96, 96, generator=draw),
            torch.randint(10, (16,), generator=draw),
        )
        batch = random_batch(one.cfg, gpu, 0)
        batch.images.copy_(pictures), batch.labels.copy_(labels)
        one.train_step(lambda batch=batch: batch, consumed=step * 16, lr=0.01)
    difference = largest_difference(together, weights(one))
    report.add_row(
        "ranks that share a GPU against one process", ranks=ranks, strategy=strategy, difference=difference
    )
    assert difference < 1e-9


@needs_nccl
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_gone_ends_the_job_in_time(report, tmp_path, by):
    """Limit of a stall: 20 s."""
    job = start_ranks(2, tmp_path, dict(batch=8), steps=100_000)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "steps").exists() or int((tmp_path / "steps").read_text() or 0) < 5:
            assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "output.txt").read_text()[
                -3000:
            ]
            time.sleep(0.1)
        ranks = [
            p for p in psutil.Process(job.pid).children(recursive=True) if str(SHARED_GPU) in p.cmdline()
        ]
        (victim,) = [
            p for p in ranks if p.environ().get("HOROVOD_RANK") == "1" and p.name().startswith("python")
        ]
        struck = time.monotonic()
        victim.send_signal(by)
        exit_code, seconds = job.wait(60), time.monotonic() - struck
    finally:
        end(job)
    said = (tmp_path / "output.txt").read_text()
    report.add_row(
        "a rank is gone", signal=by.name, seconds=seconds, last_line=said.strip().splitlines()[-1][:120]
    )
    assert exit_code != 0 and "rank 1" in said
