"""owt data prepare, owt data pack: convert data sets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from horovod_owt.commands.log import log_to_stderr
from horovod_owt.commands.options import UsersPath

SHARD_MB_OPTION = click.option(
    "--shard-mb", default=256, show_default=True, help="Approximate megabytes per tar shard."
)
SHORT_SIDE_OPTION = click.option(
    "--short-side",
    type=int,
    metavar="PIXELS",
    help="Downscale images whose shorter side is longer than this (JPEG quality 90); copy the others.",
)
WORKERS_OPTION = click.option(
    "--workers", type=click.IntRange(min=1), help="Processes.  [default: one per usable core]"
)


@click.command()
@click.argument("out", type=UsersPath())
@click.option("--train-tar", required=True, type=UsersPath(), help="ILSVRC2012_img_train.tar")
@click.option("--val-tar", required=True, type=UsersPath(), help="ILSVRC2012_img_val.tar")
@click.option("--devkit", required=True, type=UsersPath(), help="ILSVRC2012_devkit_t12.tar.gz")
@click.option(
    "--format", "kind", type=click.Choice(["folder", "shards"]), default="folder", show_default=True
)
@SHORT_SIDE_OPTION
@SHARD_MB_OPTION
@WORKERS_OPTION
@click.option(
    "--checksums",
    type=UsersPath(),
    help="Checksums of a release other than the official one, in the format of md5sum.",
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
    """Create a data set in OUT from the three files of ILSVRC2012, verified by size and md5.

    Needs no temporary space. If interrupted, the same command continues.

    \b
    Examples:  owt data prepare /data/imagenet --train-tar ILSVRC2012_img_train.tar \\
                   --val-tar ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz
               the same, with --format shards --short-side 256
    """
    log_to_stderr()
    from horovod_owt.data.build import Form
    from horovod_owt.data.prepare import Originals
    from horovod_owt.data.prepare import prepare as prepare_data

    originals = Originals.named(train_tar, val_tar, devkit, checksums)
    form = Form(kind, shard_mb, short_side)
    _make(out, lambda progress: prepare_data(out, originals, form, workers=workers, progress=progress))


@click.command()
@click.argument("src", type=UsersPath())
@click.argument("out", type=UsersPath())
@SHARD_MB_OPTION
@SHORT_SIDE_OPTION
@WORKERS_OPTION
def pack(src: Path, out: Path, shard_mb: int, short_side: int | None, workers: int | None) -> None:
    """Pack the data set SRC into tar shards in OUT: a few large files in WebDataset format.

    Training on OUT gives the same batches as on SRC. If interrupted, the same command continues.

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
    """A progress bar on stderr for each activity; the next one closes the last."""
    from tqdm import tqdm

    bar = None

    def show(what: str, done: int, total: int, unit: str) -> None:
        nonlocal bar
        if bar is None or bar.desc != f"{what}: ":
            if bar:
                bar.close()
            quiet = not sys.stderr.isatty()
            bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, disable=quiet)
            bar.desc = f"{what}: "  # tqdm's own format
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar:
            bar.close()
