"""The real training step over torch's fake CUDA tensors: run on any machine, nothing is computed.

    python tests/gpu_rehearsal/rehearse.py [--places] [CASE ...]     a table; --json for the tests

FakeTensorMode computes shapes, dtypes and devices. A few lines of C stand in for the CUDA runtime, so that
autograd starts its thread for the device. Horovod's collectives are replaced by their shapes and rules.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from preload import under_pretended_cuda

if __name__ == "__main__":
    under_pretended_cuda()

from collections import Counter  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from collectives import Collectives, Refused  # noqa: E402
from observer import GPU, Observer, patch_torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from horovod_owt.config import TrainConfig  # noqa: E402
from horovod_owt.data import pipeline_torchvision  # noqa: E402
from horovod_owt.data.batch import Batch  # noqa: E402
from horovod_owt.data.feed import TrainFeed  # noqa: E402
from horovod_owt.data.pipeline_torchvision import TorchvisionPipeline  # noqa: E402
from horovod_owt.data.store import open_data_set  # noqa: E402
from horovod_owt.data.synthetic import write_synthetic  # noqa: E402
from horovod_owt.model import dropout  # noqa: E402
from horovod_owt.parallel import groups, runtime  # noqa: E402
from horovod_owt.parallel.choose import choose_parallel  # noqa: E402
from horovod_owt.parallel.elastic import ElasticState  # noqa: E402
from horovod_owt.parallel.runtime import World  # noqa: E402
from horovod_owt.runs.opening import Opened  # noqa: E402
from horovod_owt.train import state  # noqa: E402
from horovod_owt.train.checkpoint import Checkpoint  # noqa: E402
from horovod_owt.train.evaluate import validate  # noqa: E402
from horovod_owt.train.replica import Replica  # noqa: E402

COMMON = dict(classes=1000, batch=8, image_size=224, fc_group_size=1)
HYBRID = dict(parallel="hybrid", fc_group_size=2)
BN = dict(model="alexnet-owt-bn")
CASES: dict[str, tuple[int, dict]] = {  # ranks, configuration
    "alone bf16": (1, dict(precision="bf16")),
    "alone fp32": (1, {}),
    "data fp32": (4, {}),
    "data bf16": (4, dict(precision="bf16")),
    "data fp16": (4, dict(precision="fp16")),
    "data fp64": (4, dict(precision="fp64")),
    "data fp16 clip accum": (4, dict(precision="fp16", clip_norm=1.0, accum_steps=2)),
    "data bf16 clip accum": (4, dict(precision="bf16", clip_norm=1.0, accum_steps=3)),
    "data fp32 compression": (4, dict(compression="fp16")),
    "data bf16 contiguous": (4, dict(precision="bf16", channels_last=False)),
    "data bn bf16": (4, dict(**BN, precision="bf16")),
    "data bn fp32 sync_bn": (4, dict(**BN, sync_bn=True)),
    "data bn fp16 sync_bn": (4, dict(**BN, sync_bn=True, precision="fp16")),
    "hybrid a fp32": (4, dict(**HYBRID)),
    "hybrid a bf16": (4, dict(**HYBRID, precision="bf16")),
    "hybrid a bf16 all": (4, dict(parallel="hybrid", fc_group_size=4, precision="bf16")),
    "hybrid a bf16 uneven": (3, dict(parallel="hybrid", fc_group_size=3, precision="bf16")),
    "hybrid a bf16 clip accum": (4, dict(**HYBRID, precision="bf16", accum_steps=2, clip_norm=1.0)),
    "hybrid a bn sync_bn": (4, dict(**HYBRID, **BN, sync_bn=True)),
    "hybrid a bn bf16": (4, dict(**HYBRID, **BN, precision="bf16")),
    "hybrid a smoothing compression": (4, dict(**HYBRID, label_smoothing=0.1, compression="fp16")),
    "hybrid b fp32": (4, dict(**HYBRID, owt_scheme="b")),
    "hybrid b bf16 accum": (4, dict(**HYBRID, owt_scheme="b", precision="bf16", accum_steps=2)),
    "hybrid b local bf16": (4, dict(**HYBRID, owt_scheme="b", fc_batch="local", precision="bf16")),
    "hybrid b local bn": (4, dict(**HYBRID, **BN, owt_scheme="b", fc_batch="local")),
}


# These also validate, write a checkpoint, resume from it, commit and restore a commit.
WHOLE_RUNS = {"alone bf16", "data fp32", "data fp16", "data bn bf16", "hybrid a bf16", "hybrid b local bn"}


def make_world(ranks: int, group_size: int) -> World:
    sets = groups.process_sets(ranks, group_size)
    return World(0, ranks, 0, ranks, "here", GPU, 4, tuple(sets))


def make_batch(cfg: TrainConfig) -> Batch:
    """Images as both pipelines deliver them: channels_last in memory."""
    images = torch.randn(cfg.batch, cfg.image_size, cfg.image_size, 3, device=GPU).permute(0, 3, 1, 2)
    labels = torch.zeros(cfg.batch, dtype=torch.int64, device=GPU)
    return Batch(images, labels, torch.ones(cfg.batch, dtype=torch.bool, device=GPU), np.arange(cfg.batch))


class Rehearsal:
    """One rank of a job, and what was seen of it by phase."""

    def __init__(self, ranks: int, settings: dict, *, whole_run: bool = True) -> None:
        self._whole_run = whole_run
        self.cfg = TrainConfig(**{**COMMON, **settings})
        self.ranks, self.images = ranks, self.cfg.global_batch(ranks)
        self.collectives = Collectives(ranks)
        self.observer = Observer(self.collectives)
        self.phases: dict[str, dict[str, Counter[str]]] = {}

    def run(self) -> dict[str, dict[str, Counter[str]]]:
        with pytest.MonkeyPatch.context() as patch:
            self.collectives.install()
            patch.setattr(runtime, "versions", dict)
            patch_torch(self.observer, patch)
            patch.setattr(dropout, "fused_kernel", self._fused_dropout)
            dropout._unit_words.cache_clear()  # from another mode
            with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False), self.observer:
                self._run(patch)
        return self.phases

    def _run(self, patch) -> None:
        replica = Replica(self.cfg, make_world(self.ranks, self.cfg.ranks_per_classifier()))
        batch = make_batch(self.cfg)
        with self._phase("first step"):
            replica.train_step(lambda: batch, consumed=0, lr=0.1)
        with self._phase("step"):
            replica.train_step(lambda: batch, consumed=self.images, lr=0.1)
        self._check_gradients(replica)
        if not self._whole_run:
            return
        with self._phase("validation"):
            validate(replica, iter([batch, batch]))
        with self._phase("averaging statistics"):
            replica.average_running_statistics()
        self._save_and_restore(replica, patch)
        if self.cfg.parallel == "data":
            self._commit_and_restore(replica)

    def _phase(self, name: str):
        return _Phase(self, name)

    def _fused_dropout(self, device: torch.device):
        """The jiterator launches its kernel past torch's dispatcher."""

        def fused(keys, unit_words, probability):
            assert keys.device == unit_words.device == device
            assert keys.dtype == unit_words.dtype == torch.int32
            return torch.ones((len(keys), unit_words.shape[1]), device=device)  # one kernel too

        return fused

    def _check_gradients(self, replica: Replica) -> None:
        for parameter in replica.strategy.conv_parameters + replica.strategy.fc_parameters:
            assert parameter.device == parameter.grad.device == GPU
            assert parameter.grad.dtype == parameter.dtype
            assert parameter.grad.stride() == parameter.stride()

    def _save_and_restore(self, replica: Replica, patch) -> None:
        """A checkpoint of rank 0, and a run that resumes from it."""
        copies = state.allocate_snapshot(replica)
        position = state.Position(10_000, 2, 2 * self.images)
        with self._phase("checkpoint"):
            taken = state.snapshot(replica, position, copies, validation_due=True)
        assert all(tensor.device.type == "cpu" for tensor in (taken.model | taken.optimizer).values())
        plain = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in copies.items()}
        on_disk = Checkpoint(dict(plain), {}, taken.state | {"scaler": {}})
        patch.setattr(state, "read_checkpoint", lambda path: on_disk)
        with self._phase("resume"):
            state.restore(replica, state.Position(10_000), Path("run"), Path("checkpoint"))

    def _commit_and_restore(self, replica: Replica) -> None:
        """A commit of an elastic job, the survivors' restore, and a newcomer's."""
        committed = ElasticState(GPU)
        committed.check_host_updates = lambda: None
        position = state.Position(10_000, 2, 2 * self.images)
        with self._phase("first commit"):
            state.commit(replica, position, committed, Opened(Path("run")))
        with self._phase("commit"):
            state.commit(replica, position, committed, Opened(Path("run")))
        committed.sync()
        with self._phase("restore commit"):
            state.restore_commit(replica, position, committed)


class _Phase:
    """What the observer sees in a block."""

    def __init__(self, rehearsal: Rehearsal, name: str) -> None:
        self._rehearsal, self._name = rehearsal, name

    def __enter__(self) -> None:
        self._rehearsal.observer.seen.clear()
        self._rehearsal.collectives.done.clear()

    def __exit__(self, kind, *_) -> None:
        if kind:
            return
        flights = self._rehearsal.collectives.flights
        if flights:
            raise Refused(f"never waited for: {[flight.name for flight in flights.values()]}")
        seen = {name: Counter(counts) for name, counts in vars(self._rehearsal.observer.seen).items()}
        seen["collectives"] = Counter(self._rehearsal.collectives.done)
        self._rehearsal.phases[self._name] = seen


def rehearse_auto(ranks: int, **settings) -> str:
    """`parallel=auto` times all its parts; which strategy wins is of no meaning here."""
    cfg = TrainConfig(**{**COMMON, **settings, "parallel": "auto"})
    collectives = Collectives(ranks)
    observer = Observer(collectives)
    with pytest.MonkeyPatch.context() as patch:
        collectives.install()
        patch_torch(observer, patch)
        with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False), observer:
            return choose_parallel(cfg, make_world(ranks, cfg.fc_group_size))[0].parallel


def rehearse_pipeline(kind: str) -> dict[str, Counter[str]]:
    """A batch of real files on its way to the pretended GPU, by Pillow or a stand-in for nvJPEG."""
    observer = Observer(Collectives(1))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        images = dict(train_per_class=8, val_per_class=1, size=(80, 100))
        write_synthetic(Path(folder, "data"), classes=2, workers=1, **images)
        feed = TrainFeed(open_data_set(Path(folder, "data")).train, seed=0, batch=4)
        patch_torch(observer, patch)
        patch.setattr(
            pipeline_torchvision,
            "nvjpeg_decoder",
            lambda device: pretended_nvjpeg if kind == "nvjpeg" else None,
        )
        with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False), observer:
            pipe = TorchvisionPipeline(feed, image_size=64, device_id=0, num_threads=1)
            decoded = pipe._decode_batches()  # in this thread: torch's modes are a thread's own
            patch.setattr(pipe, "_decoded", decoded)
            next(pipe)
            observer.seen.clear()
            batch = next(pipe)
            pipe.close()
    assert batch.images.device == batch.labels.device == batch.valid.device == GPU
    assert batch.images.dtype == torch.float32 and batch.images.shape == (4, 3, 64, 64)
    return {name: Counter(counts) for name, counts in vars(observer.seen).items()}


def pretended_nvjpeg(files):
    """All images have one size; it does not matter to what is rehearsed."""
    return [torch.empty((3, 80, 100), dtype=torch.uint8, device=GPU) for _ in files]


COLUMNS = ("host_syncs", "blocking_copies", "pageable_copies", "kernels", "collectives")


def table(results: dict[str, dict[str, dict[str, Counter[str]]]]) -> str:
    lines = [f"{'a step':<32}" + "".join(f"{column:>17}" for column in COLUMNS)]
    for case, phases in results.items():
        totals = (sum(phases["step"][column].values()) for column in COLUMNS)
        lines.append(f"{case:<32}" + "".join(f"{total:17d}" for total in totals))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--places", action="store_true", help="also each line of the code and what it costs")
    parser.add_argument("--json", action="store_true", help="everything, for the tests")
    args = parser.parse_args()
    cases = {name: CASES[name] for name in args.cases} or CASES
    results = {name: Rehearsal(*case, whole_run=name in WHOLE_RUNS).run() for name, case in cases.items()}
    if not args.cases:
        pipelines = {kind: rehearse_pipeline(kind) for kind in ("pillow", "nvjpeg")}
        chosen = [rehearse_auto(4, precision="bf16", fc_group_size=2), rehearse_auto(3, fc_group_size=3)]
    if args.json:
        print(json.dumps({"cases": results, "pipelines": pipelines, "chosen": chosen}))
        return 0
    print(table(results))
    for case, phases in results.items() if args.places else ():
        for phase, seen in phases.items():
            for what, counts in seen.items():
                for line, number in sorted(counts.items()):
                    print(f"{case} | {phase} | {what} | {number} x {line}")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # torch 2.0's autograd thread does not outlive the stand-in
