"""owt data prepare, owt data pack: write a data set from what there is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from horovod_owt.commands.log import log_to_stderr

SHARD_MB_OPTION = click.option(
    "--shard-mb", default=256, show_default=True, help="Megabytes of a tar shard, about."
)
SHORT_SIDE_OPTION = click.option(
    "--short-side",
    type=int,
    metavar="PIXELS",
    help="Make images smaller whose shorter side is longer than this (JPEG quality 90); copy the others.",
)
WORKERS_OPTION = click.option(
    "--workers", type=click.IntRange(min=1), help="Processes.  [default: one for each usable core]"
)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--train-tar", required=True, type=click.Path(path_type=Path), help="ILSVRC2012_img_train.tar")
@click.option("--val-tar", required=True, type=click.Path(path_type=Path), help="ILSVRC2012_img_val.tar")
@click.option("--devkit", required=True, type=click.Path(path_type=Path), help="ILSVRC2012_devkit_t12.tar.gz")
@click.option(
    "--format", "kind", type=click.Choice(["folder", "shards"]), default="folder", show_default=True
)
@SHORT_SIDE_OPTION
@SHARD_MB_OPTION
@WORKERS_OPTION
@click.option(
    "--checksums",
    type=click.Path(path_type=Path),
    help="For another release than the official one: its md5 sums, as md5sum writes them.",
)
def prepare(
    out: Path,
    train_tar: Path,
    val_tar: Path,
    devkit: Path,
    kind: str,
    short_side: int | None,
    shard_mb: int,
    workers: int | None,
    checksums: Path | None,
) -> None:
    """Make a data set in OUT from the three files of ILSVRC2012, checked by size and md5.

    Nothing is unpacked to a temporary place. Ctrl-C or a kill is continued by the same command.

    \b
    Examples:  owt data prepare /data/imagenet --train-tar ILSVRC2012_img_train.tar \\
                   --val-tar ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz
               the same with --format shards --short-side 256
    """
    log_to_stderr()
    from horovod_owt.data.build import Form
    from horovod_owt.data.prepare import Originals
    from horovod_owt.data.prepare import prepare as prepare_data

    originals = Originals.named(train_tar, val_tar, devkit, checksums)
    form = Form(kind, shard_mb, short_side)
    _make(out, lambda progress: prepare_data(out, originals, form, workers=workers, progress=progress))


@click.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@SHARD_MB_OPTION
@SHORT_SIDE_OPTION
@WORKERS_OPTION
def pack(src: Path, out: Path, shard_mb: int, short_side: int | None, workers: int | None) -> None:
    """Pack the data set SRC into tar shards in OUT: few large files, in WebDataset's format.

    Trains as SRC does, batch for batch. Ctrl-C or a kill is continued by the same command.

    \b
    Example:    owt data pack /data/imagenet /data/imagenet-packed
    To unpack:  for tar in /data/imagenet-packed/train/*.tar; do tar xf $tar -C /data/imagenet/train; done
    """
    log_to_stderr()
    from horovod_owt.data.build import Form
    from horovod_owt.data.pack import pack as pack_data

    form = Form("shards", shard_mb, short_side)
    _make(out, lambda progress: pack_data(src, out, form, workers=workers, progress=progress))


def _make(out: Path, make: Callable[[Callable], tuple[dict, bool]]) -> None:
    from horovod_owt.data.staging import size_text

    begun = time.monotonic()
    with _bars() as progress:
        facts, written = make(progress)
    took = f" in {_duration(time.monotonic() - begun)}" if written else ""
    what = f"{facts['images']:,} images, {facts['classes']} classes, {size_text(facts['bytes'])}{took}"
    click.echo(f"{'wrote' if written else 'already there:'} {out}: {what}")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """One bar on stderr for each thing that is done, the last one closed when the next one begins."""
    from tqdm import tqdm

    bar = None

    def show(what: str, done: int, total: int, unit: str) -> None:
        nonlocal bar
        if bar is None or bar.desc != f"{what}: ":
            if bar:
                bar.close()
            quiet = not sys.stderr.isatty()
            bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, disable=quiet)
            bar.desc = f"{what}: "  # as tqdm itself writes it
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar:
            bar.close()
