"""Time the parts of a training step, on all ranks together, for `parallel=auto` and `bench ceilings`."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time

import torch
from torch import Tensor, nn

from horovod_owt.config import TrainConfig
from horovod_owt.model.alexnet_owt import AlexNetOWT
from horovod_owt.parallel.collectives import gather_objects, sum_over_ranks
from horovod_owt.parallel.exchange import Exchange
from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.optimizer import build_optimizer
from horovod_owt.parallel.products import times_weight, times_weight_back, weight_gradient
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import DTYPES, autocast, configure_backends
from horovod_owt.parallel.traffic import Traffic, start_sum
from horovod_owt.perf.network import FC6_IN, HIDDEN, conv_parameters, fc_layers, fc_parameters, share
from horovod_owt.perf.predict import Parts, Sum, bucket_elements

REPEATS = 3  # of each measurement, after one warm-up
LONG_S = 0.5  # anything that takes longer is measured once
BUCKETS = 4  # of gradients, sent together; the total time is scaled up from them
CPU_IMAGES = 8  # on a CPU a few suffice: convolution time is proportional to the number of images

Seconds = dict[str, float]


def measure_parts(cfg: TrainConfig, world: World, group_sizes: dict[str, int]) -> dict[str, Parts]:
    """The parts of a step for each of `group_sizes`, the number of ranks that share the FC layers."""
    configure_backends(cfg)  # as in training, since they affect the time of convolutions
    convolutions = time_convolutions(cfg, world)
    conv_sum = time_sum_of_gradients(conv_parameters(), world.everyone, cfg, world)
    found = {}
    for name, group_size in group_sizes.items():
        classifier = time_classifier(cfg, world, group_size=group_size)
        shard = fc_parameters(cfg.classes, group_size=group_size)
        found[name] = Parts(
            conv_forward_s=convolutions["forward"],
            conv_backward_s=convolutions["backward"],
            classifier_s=classifier["passes"],
            exchange_s=_exchange(cfg, world, world.fc_group(group_size)) if group_size > 1 else 0.0,
            update_s=classifier["update"],
            conv_sum=conv_sum,
            fc_sum=time_sum_of_gradients(shard, world.shard_group(group_size), cfg, world),
        )
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def time_convolutions(cfg: TrainConfig, world: World) -> Seconds:
    """Seconds of the convolutions' forward and backward pass of a micro-batch."""
    images = min(cfg.batch, CPU_IMAGES) if world.device.type == "cpu" else cfg.batch
    with torch.device("meta"):  # the classifier's weights need no memory here
        model = AlexNetOWT(1, batch_norm=cfg.model == "alexnet-owt-bn")
    model.classifier = nn.Sequential()
    model.to_empty(device=world.device)
    for module in model.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model = model.to(dtype=_kept(cfg))
    model = model.to(memory_format=torch.channels_last) if cfg.channels_last else model
    kept = _kept(cfg)
    x = torch.randn(images, 3, cfg.image_size, cfg.image_size, device=world.device, dtype=kept)
    x = x.contiguous(memory_format=torch.channels_last) if cfg.channels_last else x
    d_out = torch.randn(images, FC6_IN, device=world.device, dtype=kept)
    out: list[Tensor] = []

    def forward() -> None:
        with autocast(cfg.precision, world.device):
            out[:] = [model.convolve(x).to(kept)]

    def backward() -> None:
        model.zero_grad()
        out[0].backward(d_out)

    seconds = time_together({"forward": forward, "backward": backward}, world)
    return {what: s * cfg.batch / images for what, s in seconds.items()}


def time_classifier(cfg: TrainConfig, world: World, *, group_size: int) -> Seconds:
    """Seconds of the matrix products and the update of one rank's part of the FC layers."""
    rows, dtype, kept = cfg.batch * group_size, DTYPES[cfg.precision], _kept(cfg)

    def filled(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, 1e-2, device=world.device, dtype=dtype)

    layers = []
    for units_in, units_out in fc_layers(cfg.classes, group_size=group_size):
        weight = nn.Parameter(filled(units_out, units_in, dtype=kept))
        weight.grad = torch.zeros_like(weight)
        layers.append((weight, filled(rows, units_in), filled(rows, units_out)))
    optimizer = build_optimizer([weight for weight, _, _ in layers], cfg)

    @torch.no_grad()
    def passes() -> None:
        for weight, x, d_out in layers:
            cast = weight.to(dtype)
            times_weight(x, cast)
            times_weight_back(d_out, cast)
            if dtype == kept:
                weight_gradient(d_out, x, weight.grad)
            else:
                weight.grad.copy_(d_out.t() @ x)

    return time_together({"passes": passes, "update": optimizer.step}, world)


def time_sum_of_gradients(parameters: int, group: Group, cfg: TrainConfig, world: World) -> Sum:
    """Seconds to sum that many gradients over the group, scaled up from a few buckets.

    On a CPU, `busy_s` is the time that this rank's threads spend moving bytes, during which they cannot
    compute; the rest is waiting for the network, which can overlap with computation.
    """
    if group.is_alone:
        return Sum()
    dtype = torch.float16 if cfg.compression == "fp16" else _kept(cfg)
    length = bucket_elements(parameters)
    buckets = [torch.zeros(length, device=world.device, dtype=dtype) for _ in range(BUCKETS)]
    traffic, busy_s = Traffic(world.device), []

    def send() -> None:
        busy_s.append(-process_time())
        transfers = [
            start_sum(bucket, group, traffic, what="auto", name=f"auto.sum.{number}", in_place=True)
            for number, bucket in enumerate(buckets)
        ]
        for transfer in transfers:
            transfer.wait()
        busy_s[-1] += process_time()

    scale = parameters / (BUCKETS * length)
    total_s = scale * time_together({"sum": send}, world)["sum"]
    if world.device.type == "cuda":
        return Sum(wire_s=total_s)
    mine_s = scale * median(busy_s) / world.threads  # threads share the cores that are left
    cores_s = min(total_s, max(gather_objects(mine_s, "auto.busy")))
    return Sum(busy_s=cores_s, wire_s=total_s - cores_s)


def _exchange(cfg: TrainConfig, world: World, group: Group) -> float:
    """Seconds of one micro-batch's transfers inside the fc_group, one after another as in scheme a."""
    exchange, dtype = Exchange(group, Traffic(world.device)), DTYPES[cfg.precision]
    rows, own = cfg.batch * group.size, share(HIDDEN, group.size, group.index)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, device=world.device, dtype=dtype)

    features, features_part = zeros(cfg.batch, FC6_IN), zeros(rows, FC6_IN)
    units_part, own_units = zeros(rows, HIDDEN), zeros(rows, own)
    logits_part = zeros(rows, cfg.classes, dtype=_kept(cfg))

    def forward_and_back() -> None:
        exchange.allgather_rows(features, "auto.features").wait()
        exchange.reduce_scatter_units(units_part, "auto.units").wait()
        exchange.allreduce(logits_part, "auto.logits").wait()
        exchange.allgather_units(own_units, "auto.units back").wait()
        exchange.reduce_scatter_rows(features_part, "auto.features back").wait()

    return time_together({"exchange": forward_and_back}, world)["exchange"]


def _kept(cfg: TrainConfig) -> torch.dtype:
    """The dtype of weights, gradients and logits, independent of autocast."""
    return DTYPES["fp64" if cfg.precision == "fp64" else "fp32"]


def time_together(actions: dict[str, Callable[[], object]], world: World) -> Seconds:
    """Seconds of each action, run in this order by all ranks together: the slowest rank's median.

    Every rank gets the same figures, so all make the same decision.
    """

    def once() -> list[float]:
        times = []
        for action in actions.values():
            synchronize(world)
            start = perf_counter()
            action()
            synchronize(world)
            times.append(perf_counter() - start)
        return times

    def on_all_ranks(mine: list[float]) -> list[float]:
        return [max(times) for times in zip(*gather_objects(mine, "auto.times"), strict=True)]

    warm_up = on_all_ranks(once())
    repeats = 1 if sum(warm_up) > LONG_S else REPEATS
    rows = [once() for _ in range(repeats)]
    slowest = on_all_ranks([median(times) for times in zip(*rows, strict=True)])
    return dict(zip(actions, slowest, strict=True))


def time_each(action: Callable[[], object], world: World, *, repeats: int, warmup: int = 2) -> list[float]:
    """Seconds of each repeat on its slowest rank; a small allreduce before each aligns the ranks."""
    mine = []
    start_line = torch.zeros(1, device=world.device)
    for _ in range(warmup + repeats):
        sum_over_ranks(start_line, "time.start")
        synchronize(world)
        start = perf_counter()
        action()
        synchronize(world)
        mine.append(perf_counter() - start)
    everyone = gather_objects(mine[warmup:], "time.each")
    return [max(times) for times in zip(*everyone, strict=True)]


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
