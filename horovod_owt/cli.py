"""The `owt` command. Command bodies import the heavy machinery, so that --help answers at once."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

import click

from horovod_owt import __version__
from horovod_owt.errors import OwtError
from horovod_owt.topology import read_topology

# Of the ranks of a host that met the same trouble, the first one speaks; then the launcher ends the others,
# or they speak after all.
SPEAKER_GRACE_S = 5.0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="owt")
def cli() -> None:
    """Train AlexNet-OWT on ImageNet-like folders of JPEGs, on one rank or on many.

    \b
    Example:  owt data synth /tmp/synth
              horovodrun -np 2 owt train /tmp/synth --recipe quickstart
    """


@cli.group()
def data() -> None:
    """Make and look after data sets."""


@data.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--classes", default=10, show_default=True, help="Number of classes.")
@click.option("--train-per-class", default=200, show_default=True, help="Training images of each class.")
@click.option("--val-per-class", default=50, show_default=True, help="Validation images of each class.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same bytes.")
def synth(out: Path, classes: int, train_per_class: int, val_per_class: int, seed: int) -> None:
    """Write a small ImageNet-shaped folder of real JPEGs to OUT.

    Its classes are patterns in random colours, so a net must learn shapes. A second run finds it there.

    \b
    Example:  owt data synth /tmp/synth --classes 20 --seed 1
    """
    from tqdm import tqdm

    from horovod_owt.data.synthetic import write_synthetic

    with tqdm(unit="image", disable=not sys.stderr.isatty(), desc="drawing") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        written = write_synthetic(
            out,
            classes=classes,
            train_per_class=train_per_class,
            val_per_class=val_per_class,
            seed=seed,
            progress=show,
        )
    click.echo(f"{'wrote' if written else 'already there:'} {out}")


SET_OPTION = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a config key."
)
PARALLEL_OPTION = click.option(
    "--parallel",
    type=click.Choice(["data", "hybrid", "auto"]),
    help="data: every rank holds the whole net. hybrid: One Weird Trick, the ranks of a node share the fully "
    "connected layers. auto: whichever is predicted to be faster here.  [default: data]",
)
RECIPE_OPTION = click.option("--recipe", metavar="NAME|FILE", help="Default: torchvision-90.")


@cli.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--run-dir", type=click.Path(path_type=Path), help="Default: runs/MODEL-DATE-TIME.")
@RECIPE_OPTION
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="Go on from the run folder's newest sound checkpoint, from none, or from the one at PATH.",
)
@PARALLEL_OPTION
@SET_OPTION
def train(
    data: Path,
    run_dir: Path | None,
    recipe: str | None,
    resume: str,
    parallel: str | None,
    settings: tuple[str, ...],
) -> None:
    """Train on the images in DATA (train/CLASS/*.JPEG, val/CLASS/*.JPEG); each rank runs this command.

    \b
    Examples:  owt train /data/imagenet
               horovodrun -np 4 owt train /data/imagenet --run-dir runs/first --set precision=bf16
               mpirun -np 4 owt train /data/imagenet --recipe my.yaml
               horovodrun -np 8 owt train /data/imagenet --parallel hybrid --set fc_group_size=4

    Ctrl-C, TERM, USR1 and USR2 end it after the current step, with a checkpoint and exit code 75.
    """
    _log_to_stderr()
    from horovod_owt.train.prepare import prepare_alone

    # nothing heavy is loaded before the input is known to be good
    request = prepare_alone(data, recipe, _with_parallel(parallel, settings))

    from horovod_owt.train.loop import train_rank

    train_rank(request, run_dir=run_dir, resume=resume)


@cli.group()
def bench() -> None:
    """Measure, with the method beside the figures."""


@bench.command()
@click.argument("data", type=click.Path(path_type=Path), required=False)
@RECIPE_OPTION
@PARALLEL_OPTION
@SET_OPTION
@click.option("--steps", default=20, show_default=True, help="Timed steps of each contender.")
@click.option("--warmup", default=3, show_default=True, help="Steps of each contender before any is timed.")
@click.option(
    "--against", type=click.Choice(["plain"]), help="A hand-written Horovod loop on random tensors."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
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
    """Time training steps on the images in DATA; without DATA on synthetic JPEGs and a net of 1000 classes.

    \b
    Example:  horovodrun --gloo -np 2 owt bench step --set batch=32 --against plain --json
    """
    _log_to_stderr()
    from horovod_owt.bench.step import bench_step, format_step_report

    settings = _with_parallel(parallel, settings)
    report = bench_step(data, recipe, settings, steps=steps, warmup=warmup, against=against)
    if report is not None:  # rank 0
        click.echo(json.dumps(report) if as_json else format_step_report(report))


@bench.command()
@RECIPE_OPTION
@SET_OPTION
@click.option("--strategies", default="data,hybrid", show_default=True, help="Which of ours on all ranks.")
@click.option(
    "--against",
    type=click.Choice(["ddp"]),
    help="torch's DistributedDataParallel: the loop of torchvision's reference script (ddp), and that with "
    "torch's own switches (ddp-tuned).",
)
@click.option("--steps", default=20, show_default=True, help="Timed steps of each contender.")
@click.option("--warmup", default=3, show_default=True, help="Steps of each contender before any is timed.")
@click.option(
    "--count-interface",
    "interface",
    metavar="IFACE",
    help="Count the bytes that hosts send on this network interface, beside those that we think we send.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
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
    """Hold strategies against each other and against one rank alone, on random images, in one job.

    Contenders take turns in short blocks; ratios and efficiency come from lower quartiles of the step time.

    \b
    Example:  horovodrun --gloo -np 2 owt bench scaling --against ddp --set batch=32
              launch/two-hosts -- owt bench scaling --set fc_group_size=all --count-interface eth0
    """
    _log_to_stderr()
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


def _with_parallel(parallel: str | None, settings: tuple[str, ...]) -> tuple[str, ...]:
    """`--parallel hybrid` is a short way to say `--set parallel=hybrid`."""
    return (*settings, f"parallel={parallel}") if parallel else settings


class _RankPrefix(logging.Formatter):
    """`10:42:07 text` for rank 0's news, `10:42:09 WARNING [rank 13 gpu07] text` for anybody's trouble."""

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%H:%M:%S")
        if record.levelno < logging.WARNING:
            return f"{time} {record.getMessage()}"
        topology = read_topology()
        who = f" [rank {topology.rank} {topology.host}]" if topology.world_size > 1 else ""
        return f"{time} {record.levelname}{who} {record.getMessage()}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_RankPrefix())
    logger = logging.getLogger("horovod_owt")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def main() -> None:
    """Run the command line: an OwtError becomes one line and its exit code, a bug ends the whole job."""
    topology = read_topology()
    alone = topology.world_size == 1
    who = "" if alone else f"[rank {topology.rank} {topology.host}] "
    try:
        cli.main()
    except OwtError as error:
        if error.shared and topology.local_rank != 0:
            time.sleep(SPEAKER_GRACE_S)
        print(f"owt: {who}{error}", file=sys.stderr, flush=True)
        exit_code = error.exit_code
    except Exception:
        print(f"owt: {who}a bug, please report it\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        exit_code = 1
    if alone:
        sys.exit(exit_code)
    # Who leaves in mid-job must not wait for its peers in Horovod's exit handler: the launcher ends them.
    sys.stdout.flush()
    os._exit(exit_code)
