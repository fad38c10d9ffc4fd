"""owt evaluate: accuracy of a trained model."""

from __future__ import annotations

from pathlib import Path

import click

from horovod_owt.commands.loading import loading
from horovod_owt.commands.log import log_to_stderr
from horovod_owt.commands.options import JSON_OPTION, NEWEST_OPTION, SET_OPTION, UsersPath
from horovod_owt.signals import end_at_once_on_ctrl_c


@click.command()
@click.argument("data", type=UsersPath())
@click.argument("checkpoint", metavar="CHECKPOINT|RUN", type=UsersPath())
@click.option(
    "--crops",
    type=click.Choice(["1", "10"]),
    default="1",
    show_default=True,
    help="1: the centre. 10: the corners, the centre and their mirror images; probabilities are averaged.",
)
@NEWEST_OPTION
@click.option(
    "--confused",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="How many of the most confused pairs of classes to list.",
)
@click.option(
    "--confusion",
    type=UsersPath(),
    metavar="FILE",
    help="Draw the confusion matrix, as .svg or .png.",
)
@SET_OPTION
@JSON_OPTION
def evaluate(
    data: Path,
    checkpoint: Path,
    crops: str,
    newest: bool,
    confused: int,
    confusion: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Evaluate a model on the validation images in DATA (val/CLASS/*.JPEG, or packed); each rank runs this.

    The model is a run folder (its best checkpoint by validation, else its newest), a checkpoint folder, a
    .safetensors file or a .pth file of torchvision's `alexnet`. Each image is counted once, on any number of
    ranks. The run may still be in progress.

    \b
    Examples:  owt evaluate /data/imagenet runs/first
               owt evaluate /data/imagenet runs/first/checkpoints/step-00450362 --crops 10
               horovodrun -np 4 owt evaluate /data/imagenet runs/first
               mpirun -np 4 owt evaluate /data/imagenet alexnet-owt-7be5be79.pth --json
               owt evaluate /data/imagenet runs/first --confusion confusion.svg --set batch=32

    Ctrl-C stops it at once. The only file it writes is that of --confusion.
    """
    end_at_once_on_ctrl_c()
    log_to_stderr()
    from horovod_owt.data.machine import raise_open_file_limit
    from horovod_owt.inference.confusion import check_confusion, plot_confusion
    from horovod_owt.inference.outcomes import crops_text, format_report
    from horovod_owt.inference.request import prepare_evaluation
    from horovod_owt.text import json_text

    raise_open_file_limit()
    if confusion is not None:
        check_confusion(confusion)
    request = prepare_evaluation(data, settings)  # validate the input before heavy modules are loaded

    with loading():
        from horovod_owt.inference.evaluate import evaluate as evaluate_ranks

    found = evaluate_ranks(request, checkpoint, crops=int(crops), newest=newest, confused=confused)
    if found is None:
        return
    click.echo(json_text(found.report) if as_json else format_report(found.report))
    if confusion is not None:
        report = found.report
        title = f"top-1 {report['top1']:.2f} % of {report['images']} images, {crops_text(report['crops'])}"
        plot_confusion(found.outcomes.confusion(len(found.names)), found.names, confusion, title=title)
