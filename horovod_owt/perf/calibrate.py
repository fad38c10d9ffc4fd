"""Fit a machine's figures to measurements.

A measurement is a row of `owt bench step` or `scaling` on one rank, the output of `owt bench ceilings`, or
the steps of a run. Rates are chosen so that the prediction for the measured configuration equals the
measurement.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from horovod_owt.config import TrainConfig, from_mapping
from horovod_owt.errors import ConfigError
from horovod_owt.files import read_user_json
from horovod_owt.perf.layers import Net, net_of
from horovod_owt.perf.machine import Machine, checked
from horovod_owt.perf.parts import Job
from horovod_owt.perf.plan import predict_row
from horovod_owt.runs.folder import read_config
from horovod_owt.runs.records import METRICS, newest_records

BENCHES = "the JSON of owt bench step, scaling or ceilings, or a run folder"
RATES = {"conv_gflops", "fc_gflops"}  # a machine file gives these for fp32
RUN_STEPS = 1000  # newest steps of a run that are used


@dataclass(frozen=True)
class Measured:
    """Seconds of a step of a configuration on one rank; of a run on several ranks, only its compute."""

    cfg: TrainConfig
    step_s: float
    jitter: float | None = None  # standard deviation as a share of the step


def calibrate(machine: Machine, paths: list[Path], wanted: Net) -> Machine:
    """`machine` with figures from these measurements; raises ConfigError."""
    steps: list[Measured] = []
    for path in paths:
        document = _read(path)
        if isinstance(document.get("figures"), dict):  # owt bench ceilings
            method = document.get("method")
            method = method if isinstance(method, dict) else {}
            _refuse_another_net(method, wanted, path)
            speedup = machine.speedup(method.get("precision", "fp32"))
            values = {key: checked(key, value, str(path)) for key, value in document["figures"].items()}
            for key in RATES & values.keys():
                values[key] /= speedup
            machine = machine.with_figures(f"measured by owt bench ceilings ({path.name})", **values)
        else:
            steps += _steps_of(document, wanted, path)
    return fit_steps(machine, steps, wanted, source=", ".join(p.name for p in paths)) if steps else machine


def fit_steps(machine: Machine, steps: list[Measured], net: Net, *, source: str) -> Machine:
    """Fit the rate of the convolutions, and with several batch sizes also the fixed time, to the steps.

    The time of the FC layers and the update, by the machine's figures, is subtracted from each step; the rest
    is linear in the batch, and fitted by least squares of relative errors. A 16-bit batch counts as the fp32
    batch that takes as long.
    """
    batches = [step.cfg.rank_batch() / machine.speedup(step.cfg.precision) for step in steps]
    points, several = [], len(set(batches)) > 1
    for batch, step in zip(batches, steps, strict=True):
        rest_s = step.step_s - _without_convolutions(machine, step.cfg, net)
        rest_s -= 0.0 if several else 1e-3 * machine["fixed_ms"] * step.cfg.accum_steps
        if rest_s <= 0:
            raise ConfigError(
                f"{source}: a step of {step.cfg.rank_batch()} images takes {1e3 * step.step_s:.3g} ms, less "
                f"than {machine.name} needs for the FC layers alone",
                wanted="a machine file of the same device",
                fix="calibrate from owt bench ceilings, which measures every part",
            )
        points.append((batch, rest_s))
    slope, fixed_s = _line(points)
    values = {"conv_gflops": net.flops("conv") / slope / 1e9}
    if several:
        values["fixed_ms"] = 1e3 * fixed_s
    if jitters := [step.jitter for step in steps if step.jitter is not None]:
        values["jitter"] = statistics.median(jitters)
    return machine.with_figures(f"measured: {source}", **values)


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Slope and intercept; a line through the origin when all batches are equal."""
    if len({batch for batch, _ in points}) == 1:
        return statistics.fmean(s / batch for batch, s in points), 0.0
    # weights 1/s^2: errors are relative
    total = sum(1 / s**2 for _, s in points)
    mean_x = sum(x / s**2 for x, s in points) / total
    mean_y = sum(1 / s for _, s in points) / total
    slope = sum((x - mean_x) * (s - mean_y) / s**2 for x, s in points) / sum(
        (x - mean_x) ** 2 / s**2 for x, s in points
    )
    intercept = mean_y - slope * mean_x
    if slope <= 0 or intercept < 0:  # noise: no line, but a rate
        slope, intercept = sum(x / s for x, s in points) / sum(x * x / s**2 for x, s in points), 0.0
    return slope, intercept


def _without_convolutions(machine: Machine, cfg: TrainConfig, net: Net) -> float:
    """Seconds of a step on one rank, except the convolutions and the fixed time."""
    fast = machine.with_figures("none", conv_gflops=1e12, fixed_ms=0.0)
    cfg = dataclasses.replace(cfg, parallel="data", owt_scheme="a", fc_batch="global")
    return predict_row(fast, Job(cfg, net, 1, 1, decodes=False)).time.total_s


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _read_run(path)
    document = read_user_json(path, wanted=BENCHES)
    if not isinstance(document, dict):
        raise ConfigError(f"{path} contains a {type(document).__name__}", wanted=BENCHES)
    return document


def _read_run(run_dir: Path) -> dict[str, Any]:
    """The compute of the run's newest steps, and its configuration."""
    config = read_config(run_dir)
    records = newest_records(run_dir / METRICS)
    began = max((epoch for epoch, _ in config.get("image_sizes", ())), default=0)  # with its last image size
    of_steps = (r for r in records if r.get("kind") == "step" and r.get("epoch", began) >= began)
    steps = list(islice(of_steps, RUN_STEPS))
    if not config or not steps:
        of_size = f" of {config['image_size']} px" if began else ""
        missing = f"steps{of_size}" if config else "configuration"
        raise ConfigError(f"the run {run_dir} has no {missing} yet", wanted="a run of some steps")
    try:
        busy = [s["step_ms"] - s.get("data_wait_ms", 0) - s.get("exposed_comm_ms", 0) for s in steps]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"steps of {run_dir} lack {error}", wanted=BENCHES) from None
    return {"config": config, "compute_ms": statistics.median(busy)}


def _steps_of(document: dict[str, Any], wanted: Net, path: Path) -> list[Measured]:
    try:
        if "config" in document:
            cfg = from_mapping(document["config"])
            _refuse_another_net(document["config"], wanted, path)
            return [Measured(cfg, 1e-3 * document["compute_ms"])]
        method = document["method"]
        _refuse_another_net(method, wanted, path)
        rows = document.get("rows", [document])
        ours = [row for row in rows if row["strategy"] == "data" and row["ranks"] == 1]
        if not ours:
            raise ConfigError(
                f"{path} has no row of one rank", wanted="owt bench scaling, or owt bench step on one rank"
            )
        return [measured(_configuration(row, wanted), row) for row in ours]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} lacks {error}", wanted=BENCHES) from None


def _configuration(row: dict[str, Any], net: Net) -> TrainConfig:
    return TrainConfig(
        model=net.name,
        classes=net.classes,
        image_size=net.image_size,
        batch=row["batch_per_rank"],
        precision=row["precision"],
    )


def measured(cfg: TrainConfig, row: dict[str, Any]) -> Measured:
    """The measurement in a benchmark's row of one rank."""
    step_ms = row["step_ms"]
    share = 1 - row.get("data_wait_share", 0.0) - row.get("exposed_comm_share", 0.0)
    jitter = (step_ms["p75"] - step_ms["p25"]) / 1.349 / step_ms["median"]  # of a normal variable
    return Measured(cfg, 1e-3 * share * step_ms["median"], jitter)


def _refuse_another_net(found: dict[str, Any], wanted: Net, path: Path) -> None:
    """Raise ConfigError if a measurement is of another model than the plan's."""
    for key, value in (
        ("model", wanted.name),
        ("image_size", wanted.image_size),
        ("classes", wanted.classes),
    ):
        if key in found and found[key] != value:
            raise ConfigError(
                f"{path} was measured with {key}={found[key]}",
                wanted=f"{key}={value}, as in this plan",
                fix=f"--set {key}={found[key]}",
            )


def net_for(cfg: TrainConfig) -> Net:
    """The network of a plan."""
    return net_of(cfg.model, classes=cfg.classes or 1000, image_size=cfg.image_size)
