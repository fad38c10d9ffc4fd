"""owt bench: benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import click

from horovod_owt.commands.log import log_to_stderr
from horovod_owt.commands.options import (
    JSON_OPTION,
    PARALLEL_OPTION,
    RECIPE_OPTION,
    SET_OPTION,
    with_parallel,
)


@click.group()
def bench() -> None:
    """Run benchmarks; each report includes its method."""


@bench.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@RECIPE_OPTION
@PARALLEL_OPTION
@SET_OPTION
@click.option(
    "--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps per contender."
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Untimed steps per contender before those.",
)
@click.option(
    "--against",
    type=click.Choice(["plain"]),
    help="Compare with a hand-written Horovod loop on random tensors.",
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
    """Time training steps on the images in DATA, or on synthetic JPEGs with a net of 1000 classes.

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
@click.option(
    "--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps per contender."
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Untimed steps per contender before those.",
)
@click.option(
    "--count-interface",
    "interface",
    metavar="IFACE",
    help="Also report the bytes that the hosts send on this network interface, as the kernel counts them.",
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
    as_json: bool,
) -> None:
    """Compare strategies with each other and with a single rank, on random images, in one job.

    Contenders take turns in short blocks; ratios and efficiency use the lower quartile of the step time.

    \b
    Example:  horovodrun --gloo -np 2 owt bench scaling --against ddp --set batch=32
              horovodrun --gloo -np 8 -H node1:4,node2:4 owt bench scaling --count-interface eth0
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
    )

    from horovod_owt.bench.scaling import bench_scaling, format_scaling_report

    report = bench_scaling(request)
    if report is not None:  # rank 0
        click.echo(json.dumps(report) if as_json else format_scaling_report(report))


@bench.command("input")
@click.argument("data", type=click.Path(path_type=Path), required=False)
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
    """Time reading and decoding the training images in DATA, or synthetic JPEGs, without a net.

    Our pipeline takes turns with torch's DataLoader and torchvision transforms, and DALI's file reader.

    \b
    Example:  owt bench input /data/imagenet --set batch=64 --set decode_threads=8 --json
    """
    log_to_stderr()
    from horovod_owt.bench.input import bench_input, format_input_report

    report = bench_input(data, recipe, settings, blocks=blocks, batches=batches)
    click.echo(json.dumps(report) if as_json else format_input_report(report))
