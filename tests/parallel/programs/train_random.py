"""Train on random images, many configurations in one job: starting ranks takes longer than the steps.

usage: train_random.py OUT RUNS     RUNS is a JSON list of {"name": ..., "settings": {...}, "steps": ...,
                                    "evaluate": whether to hold an evaluation against that of a plain net}

The images of BAD are bad in a run with bad_images=skip.

Rank 0 writes OUT/NAME.safetensors, the whole weights, and OUT/NAME.json: the losses, the gradient norms and
each rank's bytes in the last step. OUT/exchange.json has what exchange_checks.py saw, OUT/compression.json
what compression_checks.py did.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from compression_checks import check_compression
from exchange_checks import check_exchange
from safetensors.torch import save_file

from horovod_owt.config import TrainConfig, resolve
from horovod_owt.data.batch import Batch
from horovod_owt.data.feed import IGNORED
from horovod_owt.model import alexnet_owt, build_model
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.parallel.device import CPU
from horovod_owt.parallel.runtime import World
from horovod_owt.topology import read_topology
from horovod_owt.train.replica import AVERAGE, MOMENTUM, Replica

SMALL = Path(__file__).parents[1] / "small.yaml"
SIDE = 63  # px, the smallest
HIDDEN = 98  # units; few, and 4 ranks cannot share them evenly
# step -> rows of the global batch of 8: one, all of one rank of two, most of a rank
BAD = {0: [1], 1: [4, 5, 6, 7], 2: [0, 1, 3]}


def global_batch(step: int, images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on every rank and in the plain programs."""
    generator = torch.Generator().manual_seed(1000 + step)
    pictures = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return pictures, torch.randint(classes, (images,), generator=generator)


def configure(settings: dict) -> TrainConfig:
    """The recipe of the tests with these settings; lr is that of the global batch, whatever the ranks."""
    return resolve(str(SMALL), [f"{key}={value}" for key, value in settings.items()])


def train(
    cfg: TrainConfig, steps: int, world: World, *, evaluate: bool
) -> tuple[dict[str, torch.Tensor], dict]:
    """Whole weights after `steps` steps, and the record of the run."""
    replica = Replica(cfg, world)
    images, losses, norms, traffic = cfg.global_batch(world.size), [], [], {}
    for step in range(steps):
        pictures, labels = global_batch(step, images, cfg.classes)
        bad = BAD.get(step, []) if cfg.bad_images == "skip" else []
        labels[bad] = IGNORED

        batches = micro_batches(cfg, world, pictures, labels)
        report = replica.train_step(batches.__next__, consumed=step * images, lr=cfg.lr)
        assert report.bad_images == len(bad) and report.any_unannounced == bool(bad)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        traffic = {"sent": report.bytes_sent, "received": report.bytes_received}
    replica.average_running_statistics()
    whole = {
        name: t.contiguous().clone()
        for name, t in replica.strategy.gather(replica.state_tensors()).items()
        if MOMENTUM not in name
    }
    record = {"losses": losses, "norms": norms, "traffic": gather_objects(traffic, "traffic")}
    if evaluate:
        pictures, _ = global_batch(0, images, cfg.classes)
        record["evaluation_is_off_by"] = evaluation_is_off_by(replica, pictures, whole)
    return whole, record


def micro_batches(
    cfg: TrainConfig, world: World, pictures: torch.Tensor, labels: torch.Tensor
) -> Iterator[Batch]:
    """This rank's of a global batch."""
    for start in range(world.rank * cfg.rank_batch(), (world.rank + 1) * cfg.rank_batch(), cfg.batch):
        rows = slice(start, start + cfg.batch)
        faults = {row: "bad" for row, label in enumerate(labels[rows]) if label == IGNORED}
        indices = np.arange(start, start + cfg.batch)
        yield Batch(pictures[rows], labels[rows], labels[rows] >= 0, indices, faults)


def evaluation_is_off_by(replica: Replica, pictures: torch.Tensor, whole: dict[str, torch.Tensor]) -> float:
    """The largest difference to the logits of plain nets with these weights, and with their average."""
    kept = next(iter(whole.values())).dtype
    own = {name: tensor for name, tensor in whole.items() if not name.startswith(AVERAGE)}
    averaged = {name: whole.get(f"{AVERAGE}{name}", tensor) for name, tensor in own.items()}
    with replica.evaluating() as logits_of:
        nets = [(logits_of, own), (replica.averaged_model() or logits_of, averaged)]
        logits = [net(pictures.to(kept)) for net, _ in nets]
    off_by = 0.0
    for ours, (_, weights) in zip(logits, nets, strict=True):
        plain = build_model(replica.cfg.model, replica.cfg.classes).to(kept).eval()
        plain.load_state_dict(weights)
        with torch.no_grad():
            off_by = max(off_by, (ours - plain(pictures.to(kept)).float()).abs().max().item())
    return off_by


def compression_checks(world: World) -> dict[str, float]:
    cfg = configure({"image_size": SIDE, "classes": 10, "dropout": 0, "batch": 4})
    pairs = [global_batch(step, 8, cfg.classes) for step in range(4)]
    return check_compression(world, cfg, [next(micro_batches(cfg, world, *pair)) for pair in pairs])


def main() -> None:
    out, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    alexnet_owt.HIDDEN = HIDDEN
    # the process sets of groups of 2 among 4 do for groups of 1, 2 and 4
    world = runtime.init(CPU, fc_group_size=2)
    checks = {size: check_exchange(world, size) for size in range(2, world.size + 1, 2)}
    compression = compression_checks(world) if world.size == 2 else {}
    if world.is_root:
        (out / "exchange.json").write_text(json.dumps(checks))
        (out / "compression.json").write_text(json.dumps(compression))
    for run in runs:
        cfg = configure(run["settings"])
        whole, record = train(cfg, run["steps"], world, evaluate=run["evaluate"])
        if world.is_root:
            save_file(whole, out / f"{run['name']}.safetensors")
            (out / f"{run['name']}.json").write_text(json.dumps(record))
    runtime.shutdown()


if __name__ == "__main__":
    assert read_topology().world_size % 2 == 0
    main()
