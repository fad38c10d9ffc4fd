"""Compressed sums on real ranks, beside torch's own PowerSGD and beside whole gradients."""

import copy
import dataclasses
import socket

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.parallel.collectives import broadcast_object
from horovod_owt.parallel.compression import ERROR, OWNER_ERROR
from horovod_owt.parallel.exchange import Exchange
from horovod_owt.parallel.low_rank import LowRank
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.traffic import Traffic
from horovod_owt.train.replica import Replica

STEPS = 8
SIZES = (24, 40, 12)  # units of a small net: two matrices
RANK = 3


def off_by_from_torch(world: World) -> float:
    """The largest difference of a gradient to DDP's with its powerSGD_hook, relative to its norm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = broadcast_object(probe.getsockname()[1], "port")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size)
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in zip(SIZES, SIZES[1:], strict=False)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    state = PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=2, min_compression_rate=1)
    queries: dict[int, torch.Tensor] = {}

    def hook(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if state.iter == state.start_powerSGD_iter:  # it is going to draw its first Q's
            draw = torch.Generator().manual_seed(copy.deepcopy(state.rng).randint(1_000_000_000))
            for parameter in bucket.parameters():
                queries[parameter.numel()] = torch.randn(parameter.shape[1], RANK, generator=draw)
        return powerSGD_hook(state, bucket)

    ddp = nn.parallel.DistributedDataParallel(net)
    ddp.register_comm_hook(state, hook)
    exchange = Exchange(world.everyone, Traffic(world.device))
    ours = [
        LowRank(w.detach(), exchange, rank=RANK, what="check", name=f"check.{n}", seed=0)
        for n, w in enumerate(net.parameters())
    ]
    draw, off_by = torch.Generator().manual_seed(world.rank), 0.0
    for step in range(STEPS):
        images = torch.randn(16, SIZES[0], generator=draw)
        own = torch.autograd.grad(net(images).square().mean(), list(net.parameters()))
        net.zero_grad()
        ddp(images).square().mean().backward()
        if step < 2:  # DDP sums whole gradients
            continue
        if step == 2:
            for each in ours:
                each.query.copy_(queries[each.error.numel()])
        totals = [gradient / world.size for gradient in own]
        for each, total in zip(ours, totals, strict=True):
            each.start(total)
        for each in ours:
            each.advance()
        for each, total in zip(ours, totals, strict=True):
            each.finish(total)
        for total, theirs in zip(totals, net.parameters(), strict=True):
            off_by = max(off_by, ((total - theirs.grad).norm() / theirs.grad.norm()).item())
    dist.destroy_process_group()
    return off_by


def lost(world: World, cfg: TrainConfig, batches: list[Batch]) -> float:
    """The largest difference of whole gradients, summed over steps, to compressed ones and the errors left.

    Relative to the norm of the whole ones. The learning rate is 0: both have the same gradients.
    """
    sums = []
    for compression in ("none", cfg.compression):
        replica = Replica(dataclasses.replace(cfg, compression=compression), world)
        total = {name: torch.zeros_like(p) for name, p, _ in replica.strategy.named_parameters()}
        for step, batch in enumerate(batches):
            images = cfg.global_batch(world.size)
            replica.train_step(lambda batch=batch: batch, consumed=step * images, lr=0.0, compress=step > 0)
            for name, parameter, _ in replica.strategy.named_parameters():
                total[name] += parameter.grad
        for name, left in replica.strategy.compression.total().items():
            if name.startswith((ERROR, OWNER_ERROR)):
                total[name.split(".", 1)[1]] += left
        sums.append(total)
    whole, compressed = sums
    return max(((whole[name] - compressed[name]).norm() / whole[name].norm()).item() for name in whole)


def check_compression(world: World, cfg: TrainConfig, batches: list[Batch]) -> dict[str, float]:
    """What should be 0."""
    found = {"torch": off_by_from_torch(world)}
    for compression in ("onebit", "powersgd:2"):
        found[compression] = lost(world, dataclasses.replace(cfg, compression=compression), batches)
    return found
