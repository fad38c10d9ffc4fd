"""owt predict: classify images."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from horovod_owt.commands.loading import loading
from horovod_owt.commands.log import log_to_stderr
from horovod_owt.commands.options import JSON_OPTION, NEWEST_OPTION, UsersPath
from horovod_owt.commands.streams import stdout_is_read
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.signals import end_at_once_on_ctrl_c
from horovod_owt.text import json_text, one_line
from horovod_owt.topology import require_single_process

log = logging.getLogger(__name__)


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT|RUN", type=UsersPath())
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option(
    "--synsets",
    type=UsersPath(),
    metavar="FILE",
    help="Class names: lines such as `n01440764 tench, Tinca tinca`, or one name per line in label order.",
)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes for each image.")
@NEWEST_OPTION
@JSON_OPTION
def predict(
    checkpoint: Path,
    images: tuple[str, ...],
    synsets: Path | None,
    top: int,
    newest: bool,
    as_json: bool,
) -> None:
    """Print the most probable classes of each IMAGE: a file, a folder, or - for a list of paths on stdin.

    The model is a run folder, a checkpoint or a file of weights, as for `owt evaluate`. Classes are named
    after the run's class folders, or numbered if those are unknown. If an image cannot be decoded it is
    reported, the others are classified, and the exit code is 1.

    \b
    Examples:  owt predict runs/first cat.jpg photos/
               find /data -name '*.JPEG' | owt predict runs/first - --json
               owt predict alexnet-owt-7be5be79.pth cat.jpg --synsets LOC_synset_mapping.txt
    """
    end_at_once_on_ctrl_c()
    log_to_stderr()
    require_single_process("owt predict")
    from horovod_owt.config import TrainConfig
    from horovod_owt.data.paths import named_images
    from horovod_owt.inference.names import class_words
    from horovod_owt.topology import read_topology
    from horovod_owt.train.prepare import choose_device

    named = list(named_images(images, map(os.fsdecode, sys.stdin.buffer)))  # names need not be text
    paths = [path for path, fault in named if not fault]
    if not named:
        raise ConfigError("no image on stdin", wanted="a path in each line")
    device = choose_device(TrainConfig(), read_topology(), alone=True)

    with loading():
        from horovod_owt.inference.predict import predict as predict_images
        from horovod_owt.inference.weights import read_trained_model

    net = read_trained_model(checkpoint, newest=newest)
    info, rows = net.info, []
    labels = [*info.class_names, *map(str, range(len(info.class_names), info.classes))]
    words = class_words(synsets, labels) if synsets else [""] * info.classes
    bad = [{"path": path, "fault": fault} for path, fault in named if fault]
    for found in predict_images(net, paths, top=top, device=device) if paths else ():
        if found.fault:
            bad.append({"path": found.path, "fault": found.fault})
            log.warning("%s: %s", found.path, found.fault)
            continue
        best = [
            {"label": label, "class": labels[label], "words": words[label], "probability": share}
            for label, share in found.top
        ]
        if as_json:
            rows.append({"path": found.path, "top": best})
        else:
            click.echo(_text(found.path, best))
            if not stdout_is_read():
                return
    if as_json:
        click.echo(json_text({"checkpoint": str(info.source), "images": rows, "bad": bad}))
    if bad:
        raise RunError(f"{len(bad)} of {len(named)} not classified, {bad[0]['path']}: {bad[0]['fault']}")


def _text(path: str, best: list[dict]) -> str:
    rows = [f"  {100 * row['probability']:6.2f} %  {row['class']}  {row['words']}".rstrip() for row in best]
    return "\n".join(map(one_line, [path, *rows]))
