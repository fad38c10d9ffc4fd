"""owt bench: benchmarks."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import click

from horovod_owt.commands.log import log_to_stderr
from horovod_owt.commands.options import (
    JSON_OPTION,
    PARALLEL_OPTION,
    RECIPE_OPTION,
    SET_OPTION,
    UsersPath,
    with_parallel,
)

STEPS_OPTION = click.option(
    "--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps per contender."
)
WARMUP_OPTION = click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Untimed steps per contender before those.",
)


@click.group()
def bench() -> None:
    """Run benchmarks; each report includes its method."""
    from horovod_owt.data.machine import raise_open_file_limit

    raise_open_file_limit()


@bench.command()
@click.argument("data", type=UsersPath(), required=False)
@RECIPE_OPTION
@PARALLEL_OPTION
@SET_OPTION
@STEPS_OPTION
@WARMUP_OPTION
@click.option(
    "--against",
    type=click.Choice(["plain", "torch", "compile"]),
    help="Compare with a hand-written Horovod loop (plain), or with the same model in torch on each rank, "
    "without Horovod (torch), or compiled by torch.compile (compile); all on random tensors.",
)
@JSON_OPTION
def step(
    data: Path | None,
    recipe: str | None,
    parallel: str | None,
    settings: tuple[str, ...],
    steps: int,
    warmup: int,
    against: str | None,
    as_json: bool,
) -> None:
    """Time training steps on the images in DATA, or on synthetic JPEGs with a model of 1000 classes.

    \b
    Example:  horovodrun --gloo -np 2 owt bench step --set batch=32 --against plain --json
    """
    log_to_stderr()
    from horovod_owt.bench.step import bench_step, format_step_report

    settings = with_parallel(parallel, settings)
    report = bench_step(data, recipe, settings, steps=steps, warmup=warmup, against=against)
    if report is not None:  # rank 0
        click.echo(json.dumps(report) if as_json else format_step_report(report))


@bench.command()
@RECIPE_OPTION
@SET_OPTION
@click.option(
    "--strategies", default="data,hybrid", show_default=True, help="Strategies to time on all ranks."
)
@click.option(
    "--against",
    type=click.Choice(["ddp"]),
    help="Compare with torch's DistributedDataParallel: torchvision's loop (ddp), and the same with "
    "torch's performance options (ddp-tuned).",
)
@STEPS_OPTION
@WARMUP_OPTION
@click.option(
    "--count-interface",
    "interface",
    metavar="IFACE",
    help="Also report the bytes that the hosts send on this network interface, as the kernel counts them.",
)
@click.option(
    "--predict",
    "machine",
    metavar="NAME|FILE",
    help="Also print what `owt plan` predicts for this machine file.",
)
@JSON_OPTION
def scaling(
    recipe: str | None,
    settings: tuple[str, ...],
    strategies: str,
    against: str | None,
    steps: int,
    warmup: int,
    interface: str | None,
    machine: str | None,
    as_json: bool,
) -> None:
    """Compare strategies with each other and with a single rank, on random images, in one job.

    Contenders take turns in short blocks; ratios and efficiency use the lower quartile of the step time.

    \b
    Example:  horovodrun --gloo -np 2 owt bench scaling --against ddp --set batch=32
              horovodrun --gloo -np 8 -H node1:4,node2:4 owt bench scaling --count-interface eth0
              horovodrun --gloo -np 2 owt bench scaling --predict mine.yaml
    """
    log_to_stderr()
    from horovod_owt.bench.request import prepare

    request = prepare(
        recipe,
        settings,
        strategies=strategies,
        against=against,
        steps=steps,
        warmup=warmup,
        interface=interface,
        machine=machine,
    )

    from horovod_owt.bench.scaling import bench_scaling, format_scaling_report

    report = bench_scaling(request)
    if report is not None:  # rank 0
        click.echo(json.dumps(report) if as_json else format_scaling_report(report))


@bench.command("input")
@click.argument("data", type=UsersPath(), required=False)
@RECIPE_OPTION
@SET_OPTION
@click.option("--blocks", type=click.IntRange(1), default=8, show_default=True, help="Turns per contender.")
@click.option(
    "--batches", type=click.IntRange(1), default=16, show_default=True, help="Timed batches per turn."
)
@JSON_OPTION
def input_(
    data: Path | None,
    recipe: str | None,
    settings: tuple[str, ...],
    blocks: int,
    batches: int,
    as_json: bool,
) -> None:
    """Time reading and decoding the training images in DATA, or synthetic JPEGs, without training.

    Compares, in alternating turns: our pipeline, DALI's file reader, torch's DataLoader with torchvision's
    transforms, SPDL if it is installed, decoding alone, and our pipeline with all images in the cache.

    \b
    Example:  owt bench input /data/imagenet --set batch=64 --set decode_threads=8 --json
    """
    log_to_stderr()
    from horovod_owt.bench.input import bench_input, format_input_report

    report = bench_input(data, recipe, settings, blocks=blocks, batches=batches)
    click.echo(json.dumps(report) if as_json else format_input_report(report))


@bench.command()
@click.argument("data", type=UsersPath(), required=False)
@RECIPE_OPTION
@SET_OPTION
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Timed training steps.")
@JSON_OPTION
def ceilings(
    data: Path | None, recipe: str | None, settings: tuple[str, ...], steps: int, as_json: bool
) -> None:
    """Measure the machine's peak rates, and the share of them that training reaches.

    Peak rates are those of matrix products, convolutions, copies, a plain TCP ring and decoding alone. The
    JSON also has the figures of a machine file, for `owt plan --calibrate`.

    \b
    Example:  owt bench ceilings --set batch=32 --json > ceilings.json
              horovodrun --gloo -np 2 owt bench ceilings --set batch=32
    """
    log_to_stderr()
    from horovod_owt.bench.ceilings import bench_ceilings, format_ceilings_report

    report = bench_ceilings(data, recipe, settings, steps=steps)
    if report is not None:  # rank 0
        click.echo(json.dumps(report) if as_json else format_ceilings_report(report))


@bench.command()
@RECIPE_OPTION
@SET_OPTION
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timed rounds.")
@JSON_OPTION
def layers(recipe: str | None, settings: tuple[str, ...], rounds: int, as_json: bool) -> None:
    """Measure where the time of a training step goes: forward and backward of each layer, on random images.

    Rates are compared with the best convolution and the best matrix product of the same run. The part of the
    step that the layers do not account for is autograd, memory and, with several ranks, communication.

    \b
    Example:  owt bench layers --set batch=64
              horovodrun --gloo -np 2 owt bench layers --set batch=32 --json
    """
    log_to_stderr()
    from horovod_owt.config import resolve

    cfg = resolve(recipe, settings)
    from horovod_owt.bench.layers import bench_layers, format_layers_report

    report = bench_layers(cfg, rounds=rounds)
    if report is not None:  # rank 0
        click.echo(json.dumps(report) if as_json else format_layers_report(report))


@bench.command()
@SET_OPTION
@click.option("--min-bytes", default=1 << 10, show_default=True, help="Smallest buffer.")
@click.option(
    "--max-bytes", default=256 << 20, show_default=True, help="Largest buffer; each is 4 times the last."
)
@click.option("--plot", type=UsersPath(dir_okay=False), help="Write busbw by size, as SVG.")
@JSON_OPTION
def collectives(
    settings: tuple[str, ...], min_bytes: int, max_bytes: int, plot: Path | None, as_json: bool
) -> None:
    """Time the collectives that training uses: allreduce, allgather, alltoall, broadcast.

    Runs over Gloo, MPI or NCCL, depending on launcher and devices; bandwidths are defined as in nccl-tests.

    \b
    Example:  horovodrun --gloo -np 2 owt bench collectives
              mpirun -np 4 owt bench collectives --max-bytes 16777216 --json
    """
    log_to_stderr()
    from horovod_owt.config import resolve
    from horovod_owt.perf.plot import check_lines_plot, plot_collectives

    if plot:
        check_lines_plot(plot)
    cfg = resolve(None, settings)
    from horovod_owt.bench.collectives import bench_collectives, format_collectives_report

    report = bench_collectives(cfg, min_bytes, max_bytes)
    if report is None:
        return
    click.echo(json.dumps(report) if as_json else format_collectives_report(report))
    if plot:
        plot_collectives(report, plot)


@bench.command()
@click.argument("data", type=UsersPath(), required=False)
@RECIPE_OPTION
@SET_OPTION
@click.option("--batches", default=60, show_default=True, help="Timed mini-batches of 128 images.")
@JSON_OPTION
def boston(
    data: Path | None, recipe: str | None, settings: tuple[str, ...], batches: int, as_json: bool
) -> None:
    """Repeat the measurement of Boston's report: AlexNet-OWT on mini-batches of 128 real JPEGs.

    Prints seconds per mini-batch, minutes for 1000 and the loss, next to the report's 1.7, 32 and 6.9 and to
    the planner's prediction for four GK210s. Without DATA each rank first draws 200 synthetic JPEGs and
    assigns them to 1000 classes. On several ranks it trains hybrid, as fbcunn did.

    Ctrl-C ends it with a report of the completed mini-batches, and exit code 130.

    \b
    Example:  horovodrun --gloo -np 2 owt bench boston --batches 1000
    """
    log_to_stderr()
    from horovod_owt.bench.boston import bench_boston, format_boston_report

    report = bench_boston(data, recipe, settings, batches=batches)
    if report is not None:  # rank 0
        click.echo(json.dumps(report) if as_json else format_boston_report(report))
        if report["batches"] < batches:
            sys.exit(128 + signal.SIGINT)
