"""Check a claim such as "1000 epochs in 32 minutes" by arithmetic, line by line, in two readings.

As written: epochs of ImageNet, and an error rate. As printed: mini-batches, and the value of the loss, which
is what fbcunn's training program prints beside each mini-batch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.perf.layers import Net, net_of
from horovod_owt.perf.machine import Machine
from horovod_owt.perf.parts import Job
from horovod_owt.perf.plan import IMAGENET, fastest, plan
from horovod_owt.text import nearest

UNIT_S = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}
COUNTED = ("epoch", "mini-batch", "batch", "step", "iteration")
EXAMPLE = '"1000 epochs in 32 minutes"'
MINI_BATCH = 128  # images, of fbcunn's program
TOP1_ERROR, TOP5_ERROR = 42.5, 19.8  # percent, AlexNet's best published: see SOURCES
FAST_GAIN = 5  # more than FFT or Winograd save of a direct convolution's multiplications

SOURCES = {
    "fbcunn": "facebookarchive/fbcunn, examples/imagenet/train.lua and opts.lua",
    "accuracy": "cuda-convnet2 wiki (TrainingExample): 42.548 % top-1, 19.81 % top-5, one view",
    "torchvision": "torchvision's alexnet: 43.478 % top-1, 20.934 % top-5",
    "speed": "TensorFlow benchmarks (2017), AlexNet, batch 512: 2328 images/s on four GK210 (2479 on EC2)",
    "era": "convnet-benchmarks, AlexNet-OWT on one Titan Black: 275 to 489 ms for 128 images (2014-15)",
}


@dataclass(frozen=True)
class Claim:
    """A claim of `count` epochs (or mini-batches) in `total_s` seconds, perhaps with an error."""

    count: float
    total_s: float
    each_s: float | None = None
    error: float | None = None
    unit: str = "epoch"  # or mini-batch

    @property
    def per_unit_s(self) -> float:
        """Seconds per unit, as stated, else by division."""
        return self.each_s or self.total_s / self.count


def parse_claim(text: str, *, error: float | None, machine: Machine) -> Claim:
    """Parse a claim; one that the machine's report makes is completed from it. Raises ConfigError."""
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"\s*{number}\s+([a-z-]+)\s+in\s+{number}\s+([a-z]+)\s*", text.lower())
    if not found:
        raise ConfigError(f"--claim {text!r}", wanted=f"COUNT epochs in NUMBER minutes, such as {EXAMPLE}")
    count, what, duration, unit = found.groups()
    what, unit = what.removesuffix("es" if what.endswith("ches") else "s"), unit.removesuffix("s")
    if what not in COUNTED:
        raise ConfigError(
            f"--claim counts {found[2]!r}", wanted="epochs", fix=f"use {nearest(what, COUNTED) or 'epoch'}s"
        )
    if unit not in UNIT_S:
        near = nearest(unit, UNIT_S) or "minute"
        raise ConfigError(f"--claim has {found[4]!r}", wanted=f"{', '.join(UNIT_S)}", fix=f"use {near}s")
    count, total_s = float(count), float(duration) * UNIT_S[unit]
    if not count or not total_s:
        raise ConfigError(f"--claim {text!r}", wanted="numbers above 0")
    if error is not None and not 0 < error < 100:
        raise ConfigError(f"--error {error:g}", wanted="a number between 0 and 100")
    report = machine.report
    is_reports = report and (count, total_s) == (report["epochs"], 60 * report["minutes"])
    each_s = report["s_per_epoch"] if is_reports else None
    return Claim(count, total_s, each_s, error, unit="epoch" if what == "epoch" else "mini-batch")


def check_claim(claim: Claim, machine: Machine, net: Net | None = None) -> dict[str, Any]:
    """The readings with their lines, and a verdict. A claim of mini-batches has only one."""
    net = net or net_of("alexnet-owt")
    readings = [_printed(claim, machine, net)]
    if claim.unit == "epoch":
        readings.insert(0, _written(claim, machine, net))
    return {
        "machine": machine.name,
        "net": net.name,
        "claim": {
            "count": claim.count,
            "total_s": claim.total_s,
            "s_each": claim.per_unit_s,
            "error": claim.error,
        },
        "readings": readings,
        "verdict": _verdict(claim, readings),
        "sources": SOURCES,
    }


def _verdict(claim: Claim, readings: list[dict[str, Any]]) -> str:
    written, printed = readings[0], readings[-1]
    if written["fits"]:
        return "As written it is possible."
    if not printed["fits"]:
        return "Neither reading fits this machine." if len(readings) > 1 else "It does not fit this machine."
    fault = f"the figures are {_times(written['factor'])} times out of this machine's reach"
    if written["factor"] <= 1:
        fault = f"the speed is possible, but not an error of {claim.error:g} %"
    return f"As written {fault}; read as mini-batches of {MINI_BATCH} and a loss, all of them fit."


def predicted_images_per_s(machine: Machine, net: Net, *, global_batch: int) -> float:
    """The planner's prediction for one node of this machine with its best strategy."""
    ranks = machine.ranks_per_node
    cfg = TrainConfig(parallel="auto", batch=max(1, global_batch // ranks), classes=net.classes)
    return fastest(plan(machine, Job(cfg, net, 1, ranks)), machine).images_per_s


def _written(claim: Claim, machine: Machine, net: Net) -> dict[str, Any]:
    each_s, peak = claim.per_unit_s, machine["peak_gflops"] * machine.ranks_per_node
    images_per_s = IMAGENET / each_s
    flops = IMAGENET * net.flops()
    floor_s = flops / (1e9 * peak)
    reachable = predicted_images_per_s(machine, net, global_batch=MINI_BATCH * machine.ranks_per_node)
    wanting = images_per_s / reachable
    lines = [
        *_duration_lines(claim, "epoch"),
        f"ImageNet (ILSVRC2012) has {IMAGENET:,} training images: "
        f"{IMAGENET:,} / {each_s:g} s = {images_per_s:,.0f} images/s",
        f"planned for this machine: {reachable:,.0f} images/s, "
        + (f"{_times(wanting)} times fewer" if wanting > 1 else "no fewer"),
        f"measured on four GK210 by others: 2,328 images/s ({SOURCES['speed']})",
        f"{net.name} takes {net.flops() / 1e9:.2f} GFLOP an image, forward and backward: "
        f"{flops / 1e15:.2f} PFLOP an epoch",
        f"{machine.ranks_per_node} x {machine['peak_gflops'] / 1e3:.2f} = {peak / 1e3:.2f} TFLOP/s at the "
        f"peak ({machine.figures['peak_gflops'].source})",
        f"{flops / 1e15:.2f} PFLOP / {peak / 1e3:.2f} TFLOP/s = {floor_s:.0f} s an epoch at least, "
        f"{_times(floor_s / each_s)} times {each_s:g} s",
        f"even if fast convolutions (FFT, Winograd) did it with a {FAST_GAIN}th of the arithmetic: "
        f"{_times(floor_s / FAST_GAIN / each_s)} times",
    ]
    fits = each_s >= floor_s
    if claim.error is not None:
        lines += [
            f"AlexNet's published errors: {TOP1_ERROR} % top-1, {TOP5_ERROR} % top-5 ({SOURCES['accuracy']})",
            f"{claim.error:g} % would be {TOP5_ERROR / claim.error:.1f} times better in top-5, "
            f"{TOP1_ERROR / claim.error:.1f} times in top-1"
            if claim.error < TOP5_ERROR
            else f"{claim.error:g} % is {claim.error / TOP5_ERROR:.1f} times that of top-5, "
            f"{claim.error / TOP1_ERROR:.1f} times that of top-1",
        ]
        fits = fits and claim.error >= 0.9 * TOP5_ERROR
    return {
        "reading": "written",
        "s_per_epoch": each_s,
        "floor_s": floor_s,
        "images_per_s": images_per_s,
        "factor": floor_s / each_s,
        "fits": fits,
        "lines": lines,
    }


def _printed(claim: Claim, machine: Machine, net: Net) -> dict[str, Any]:
    each_s, wall_s = claim.per_unit_s, claim.total_s / claim.count
    images_per_s = MINI_BATCH / each_s
    flops, peak = MINI_BATCH * net.flops(), machine["peak_gflops"] * machine.ranks_per_node
    floor_s = flops / (1e9 * peak)
    planned_s = MINI_BATCH / predicted_images_per_s(machine, net, global_batch=MINI_BATCH)
    lines = [
        f"fbcunn's program prints a line for each mini-batch of {MINI_BATCH}: `Time`, its seconds without "
        f"the wait for images, and `Err`, the value of the loss ({SOURCES['fbcunn']})",
        *_duration_lines(claim, "mini-batch"),
    ]
    if wall_s > each_s:
        lines.append(
            f"{wall_s:g} s - {each_s:g} s = {wall_s - each_s:.2f} s a mini-batch for the wait for images"
        )
    lines += [
        f"{MINI_BATCH} / {each_s:g} s = {images_per_s:.1f} images/s",
        f"{flops / 1e9:.0f} GFLOP / {peak / 1e3:.2f} TFLOP/s = {floor_s:.3f} s at least; "
        f"planned for this machine with today's software: {planned_s:.3f} s",
        f"software of that time on one larger GPU: {SOURCES['era']}",
    ]
    fits = each_s >= floor_s
    if claim.error is not None:
        loss = math.log(net.classes)
        lines += [
            f"ln({net.classes}) = {loss:.4f}: the loss of a net of {net.classes} classes that has learned "
            f"nothing; {claim.error:g} is {'' if _is_loss(claim.error, loss) else 'not '}that number",
            "an AlexNet without batch normalisation stays there for its first hundreds of mini-batches",
        ]
        fits = fits and _is_loss(claim.error, loss)
    return {
        "reading": "printed",
        "s_per_batch": each_s,
        "floor_s": floor_s,
        "images_per_s": images_per_s,
        "factor": floor_s / each_s,
        "fits": fits,
        "lines": lines,
    }


def _times(factor: float) -> str:
    """To two significant digits, or to the nearest whole number."""
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.2g}"


def _is_loss(value: float, loss: float) -> bool:
    """Whether the values agree to one decimal."""
    return abs(value - loss) < 0.05


def _duration_lines(claim: Claim, unit: str) -> list[str]:
    by_division = claim.total_s / claim.count
    lines = [f"{claim.total_s / 60:g} minutes / {claim.count:g} = {by_division:.3g} s for each {unit}"]
    if claim.each_s:
        lines.append(f"the report also states {claim.each_s:g} s for each")
    return lines


def format_claim(checked: dict[str, Any]) -> str:
    """The arithmetic as text."""
    titles = {
        "written": "As written: epochs of ImageNet, and an error rate",
        "printed": f"As printed: mini-batches of {MINI_BATCH}, and a loss",
    }
    blocks = []
    for reading in checked["readings"]:
        fits = "fits" if reading["fits"] else "does not fit"
        lines = [f"{titles[reading['reading']]}: {fits}", *(f"  {line}" for line in reading["lines"])]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, checked["verdict"]])
