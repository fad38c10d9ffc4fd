"""owt data: create and check data sets."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from horovod_owt.commands.data_build import pack, prepare
from horovod_owt.commands.data_stats import stats
from horovod_owt.commands.data_verify import verify
from horovod_owt.commands.options import UsersPath


@click.group()
def data() -> None:
    """Create and check data sets."""
    from horovod_owt.data.machine import raise_open_file_limit

    raise_open_file_limit()


data.add_command(prepare)
data.add_command(pack)
data.add_command(verify)
data.add_command(stats)


@data.command()
@click.argument("out", type=UsersPath())
@click.option("--classes", default=10, show_default=True, help="Number of classes.")
@click.option("--train-per-class", default=200, show_default=True, help="Training images per class.")
@click.option("--val-per-class", default=50, show_default=True, help="Validation images per class.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
def synth(out: Path, classes: int, train_per_class: int, val_per_class: int, seed: int) -> None:
    """Write a small synthetic data set of JPEGs in ImageNet's layout to OUT.

    Classes are patterns in random colours, so a model must learn shapes. An existing OUT is kept.

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
