"""Where the time of a training step goes: each layer's kernels in the order of a step, and the step itself.

All ranks measure at the same time, and each figure is the slowest rank's. The time that the kernels do not
explain is autograd, allocation, copies and, with several ranks, communication.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horovod_owt.bench.blocks import finish_queued_work, heading, method
from horovod_owt.bench.ceilings import CLASSES, convolution_gflops, matrix_gflops, training_steps
from horovod_owt.config import TrainConfig
from horovod_owt.model.alexnet_owt import FC6_IN, AlexNetOWT
from horovod_owt.model.dropout import keep_scale
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.parallel.optimizer import build_optimizer
from horovod_owt.parallel.products import times_weight, times_weight_back, weight_gradient
from horovod_owt.parallel.step import DTYPES, configure_backends
from horovod_owt.perf.layers import net_of
from horovod_owt.perf.network import HIDDEN, fc_layers
from horovod_owt.topology import rank_topology
from horovod_owt.train.prepare import choose_device

PASSES = ("forward", "by input", "by weight")
aten = torch.ops.aten

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One kernel, or a few that belong together."""

    layer: str
    what: str  # one of PASSES; "forward" where there are no passes
    run: Callable[[], object]
    flops: int = 0  # of a convolution or matrix product


def bench_layers(cfg: TrainConfig, *, rounds: int) -> dict[str, Any] | None:
    """Milliseconds of each layer's passes and of a step; returns the report on rank 0, else None."""
    cfg = dataclasses.replace(cfg, parallel="data", fc_batch="global", owt_scheme="a", accum_steps=1)
    cfg = dataclasses.replace(cfg, classes=cfg.classes or CLASSES, compression="none")
    device = choose_device(cfg, rank_topology())
    world = runtime.init(device, stall_limit_s=cfg.stall_limit_s)
    runtime.check_devices(device, world)
    configure_backends(cfg)
    ceilings = {"conv": convolution_gflops(cfg, world), "fc": matrix_gflops(cfg, world)}
    works = list(all_work(cfg, world.device))
    mine: list[list[float]] = []
    for number in range(1 + rounds):
        mine.append([_seconds(work, world.device) for work in works])
        if world.is_root:
            log.info("round %d of %d%s", number, rounds, "" if number else ", not counted")
    everyone = gather_objects([median(column) for column in zip(*mine[1:], strict=True)], "layers.seconds")
    slowest = [max(seconds) for seconds in zip(*everyone, strict=True)]
    step_s = training_steps(cfg, world, rounds)
    report = {
        "rows": [_row(work, seconds, ceilings) for work, seconds in zip(works, slowest, strict=True)],
        "kernels_ms": 1e3 * sum(slowest),
        "step_ms": 1e3 * median(step_s),
        "ceilings_gflops": ceilings,
        "method": {
            **method(cfg, world, warmup=1),
            "rounds": rounds,
            "classes": cfg.classes,
            "batch_per_rank": cfg.rank_batch(),
            "precision": cfg.precision,
            "ranks": world.size,
            "time": "of the slowest rank, median of the rounds; in a round all kernels run in turn",
            "ceilings": "best forward convolution of the model, best product of square matrices",
        },
    }
    runtime.shutdown()
    return report if world.is_root else None


def all_work(cfg: TrainConfig, device: torch.device) -> Iterator[Work]:
    """The kernels of one rank's training step, in forward order."""
    torch.manual_seed(cfg.seed)
    yield from _features(cfg, device)
    yield from _classifier(cfg, device)
    yield _update(cfg, device)


def _features(cfg: TrainConfig, device: torch.device) -> Iterator[Work]:
    """Convolutions, normalisations, pools and ReLUs."""
    dtype, batch_norm = DTYPES[cfg.precision], cfg.model == "alexnet-owt-bn"
    features = AlexNetOWT(1, batch_norm=batch_norm).features.to(device, dtype)
    layers = iter(net_of(cfg.model, classes=cfg.classes, image_size=cfg.image_size).layers())
    x = torch.randn(cfg.batch, 3, cfg.image_size, cfg.image_size, device=device, dtype=dtype)
    if cfg.channels_last:
        features, x = (each.to(memory_format=torch.channels_last) for each in (features, x))
    number = 0
    for module in features:
        if isinstance(module, nn.Conv2d):
            number += 1
            layer = next(layers)
            y = _without_graph(module, x)
            flops = cfg.batch * layer.forward_flops
            yield Work(layer.name, "forward", lambda m=module, x=x: _without_graph(m, x), flops)
            if layer.input_gradient:
                by_input = _convolution_backward(module, x, y, [True, False, False])
                yield Work(layer.name, "by input", by_input, flops)
            by_weight = _convolution_backward(module, x, y, [False, True, True])
            yield Work(layer.name, "by weight", by_weight, flops)
        else:
            kind = {nn.MaxPool2d: "pool", nn.ReLU: "relu", nn.BatchNorm2d: "norm"}[type(module)]
            y = _without_graph(module, x.clone(memory_format=torch.preserve_format))
            yield from _elementwise(f"{kind}{number}", module, x, y)
        x = y


@torch.no_grad()
def _without_graph(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return module(x)


def _convolution_backward(conv: nn.Conv2d, x: Tensor, y: Tensor, mask: list[bool]) -> Callable[[], object]:
    channels = [conv.out_channels]
    geometry = (conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, mask)
    weight, d_y = conv.weight.detach(), torch.randn_like(y)
    return lambda: aten.convolution_backward(d_y, x, weight, channels, *geometry)


def _elementwise(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Iterator[Work]:
    """Forward and backward of a module without many FLOPs, by autograd."""
    yield Work(name, "forward", lambda: _without_graph(module, x))
    if isinstance(module, nn.ReLU):  # in place: its result is what the backward pass needs
        d_y = torch.randn_like(y)
        yield Work(name, "by input", lambda: aten.threshold_backward(d_y, y, 0))
        return
    inner = x.detach().requires_grad_()
    with torch.enable_grad():
        out = module(inner)
    d_y = torch.randn_like(out)
    wanted = [inner, *module.parameters()]
    yield Work(name, "by input", lambda: torch.autograd.grad(out, wanted, d_y, retain_graph=True))


def _classifier(cfg: TrainConfig, device: torch.device) -> Iterator[Work]:
    """The three products of each FC layer, its ReLU and dropout, and the loss."""
    dtype, kept = DTYPES[cfg.precision], torch.float64 if cfg.precision == "fp64" else torch.float32
    keys = torch.randint(-(2**31), 2**31, (cfg.batch, 2), dtype=torch.int32, device=device)
    for number, (units_in, units_out) in enumerate(fc_layers(cfg.classes)):
        name, flops = f"fc{6 + number}", 2 * cfg.batch * units_in * units_out
        weight = torch.randn(units_out, units_in, device=device, dtype=dtype)
        x = torch.randn(cfg.batch, units_in, device=device, dtype=dtype)
        d_y = torch.randn(cfg.batch, units_out, device=device, dtype=dtype)
        gradient = torch.zeros(units_out, units_in, device=device, dtype=dtype)
        if number < 2 and cfg.dropout:
            units = range(FC6_IN if number == 0 else HIDDEN)
            yield Work(
                f"dropout{6 + number}",
                "forward",
                lambda x=x, n=number, units=units: x * keep_scale(keys, n, units, cfg.dropout),
            )
        yield Work(name, "forward", lambda w=weight, x=x: times_weight(x, w), flops)
        yield Work(name, "by input", lambda w=weight, d=d_y: times_weight_back(d, w), flops)
        yield Work(name, "by weight", lambda d=d_y, x=x, g=gradient: weight_gradient(d, x, g), flops)
        if number < 2:
            z = torch.randn(cfg.batch, units_out, device=device, dtype=kept)
            yield Work(f"relu{6 + number}", "forward", lambda z=z: F.relu(z))
            yield Work(f"relu{6 + number}", "by input", lambda z=z: aten.threshold_backward(z, z, 0))
    logits = torch.randn(cfg.batch, cfg.classes, device=device, dtype=kept)
    labels = torch.randint(cfg.classes, (cfg.batch,), device=device)
    yield Work("loss", "forward", lambda: _loss_and_gradient(logits, labels, cfg.label_smoothing))


def _loss_and_gradient(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    inner = logits.detach().requires_grad_()
    loss = F.cross_entropy(inner, labels, reduction="sum", label_smoothing=label_smoothing)
    return torch.autograd.grad(loss, inner)[0]


def _update(cfg: TrainConfig, device: torch.device) -> Work:
    net = AlexNetOWT(cfg.classes, batch_norm=cfg.model == "alexnet-owt-bn").to(device)
    parameters = list((net.double() if cfg.precision == "fp64" else net).parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return Work("update", "forward", build_optimizer(parameters, cfg).step)


def _seconds(work: Work, device: torch.device) -> float:
    finish_queued_work(device)
    start = perf_counter()
    work.run()
    finish_queued_work(device)
    return perf_counter() - start


def _row(work: Work, seconds: float, ceilings: dict[str, float]) -> dict[str, Any]:
    row = {"layer": work.layer, "what": work.what, "ms": 1e3 * seconds}
    if work.flops:
        gflops = work.flops / seconds / 1e9
        ceiling = ceilings["fc" if work.layer.startswith("fc") else "conv"]
        row |= {"gflops": gflops, "share": gflops / ceiling}
    return row


def format_layers_report(report: dict[str, Any]) -> str:
    """The report as text: a line for each layer."""
    method, ceilings = report["method"], report["ceilings_gflops"]
    lines = [
        heading(report),
        "",
        f"{'':10}" + "".join(f"{what + ' ms':>13}{'GFLOP/s':>9}{'share':>7}" for what in PASSES),
    ]
    by_layer: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        by_layer.setdefault(row["layer"], {})[row["what"]] = row
    for layer, passes in by_layer.items():
        line = f"{layer:10}"
        for what in PASSES:
            row = passes.get(what)
            line += f"{row['ms']:13.1f}" if row else f"{'':13}"
            line += f"{row['gflops']:9.1f}{row['share']:7.0%}" if row and "gflops" in row else f"{'':16}"
        lines.append(line.rstrip())
    rest_ms = report["step_ms"] - report["kernels_ms"]
    lines += [
        "",
        f"all of them {report['kernels_ms']:.1f} ms, a step {report['step_ms']:.1f} ms: "
        f"{rest_ms:.1f} ms ({rest_ms / report['step_ms']:.0%}) between the kernels",
        f"shares of {ceilings['conv']:.1f} GFLOP/s, the best convolution, and {ceilings['fc']:.1f}, the best "
        "matrix product; medians of the slowest rank",
        ", ".join(f"{name} {version}" for name, version in method["versions"].items()),
    ]
    return "\n".join(lines)
