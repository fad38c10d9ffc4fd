"""owt data stats: statistics of a data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from horovod_owt.commands.options import JSON_OPTION, UsersPath
from horovod_owt.text import without_terminal_codes


@click.command()
@click.argument("root", type=UsersPath())
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=5000,
    show_default=True,
    help="Number of training images to measure.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Selects the sample.")
@JSON_OPTION
def stats(root: Path, sample: int, seed: int, as_json: bool) -> None:
    """Print the number of images and classes, sizes, bytes, and channel mean and std of the data set ROOT.

    \b
    Example:  owt data stats /tmp/synth --sample 500
    """
    from tqdm import tqdm

    from horovod_owt.data.listing import left_out_text
    from horovod_owt.data.stats import data_stats
    from horovod_owt.data.store import open_data_set

    data = open_data_set(root)
    total = min(sample, len(data.train))
    with tqdm(total=total, unit="image", disable=not sys.stderr.isatty(), desc="measuring") as bar:
        report = data_stats(data, sample=sample, seed=seed, progress=bar.update)
    click.echo(json.dumps(report) if as_json else _text(report, left_out_text(data.left_out)))


def _text(report: dict[str, Any], left_out: str) -> str:
    images, file_bytes, classes = report["images"], report["bytes"], report["classes"]
    smallest, largest = classes["smallest"], classes["largest"]
    lines = [
        f"images   {images['train']} train, {images['val']} val",
        f"bytes    {file_bytes['train']:,} train, {file_bytes['val']:,} val",
        f"classes  {classes['count']}: {smallest['images']} training images in the smallest "
        f"({smallest['name']}), {largest['images']} in the largest ({largest['name']})",
        f"sample   {report['sampled']} training images, seed {report['seed']}; "
        f"{report['bad_in_sample']} bad ones skipped",
    ]
    if report["left_out"]:
        lines.insert(1, f"{left_out}; `owt data verify` names them")
    if report["sampled"]:
        for name in ("width", "height"):
            spread = report[name]
            lines.append(f"{name:8} {spread['min']} to {spread['max']} px, median {spread['median']:g}")
        for name in ("mean", "std"):
            lines.append(f"{name:8} {', '.join(f'{value:.4f}' for value in report[name])}  (RGB, 0..1)")
    return without_terminal_codes("\n".join(lines))
