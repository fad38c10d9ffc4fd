"""owt export: convert a trained model for other tools."""

from __future__ import annotations

import json
from pathlib import Path

import click

from horovod_owt.commands.loading import loading
from horovod_owt.commands.log import log_to_stderr
from horovod_owt.commands.options import JSON_OPTION, NEWEST_OPTION, UsersPath
from horovod_owt.topology import require_single_process


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT|RUN", type=UsersPath())
@click.argument("out", type=UsersPath())
@NEWEST_OPTION
@JSON_OPTION
def export(checkpoint: Path, out: Path, newest: bool, as_json: bool) -> None:
    """Export a trained model to OUT, whose suffix selects the format: .onnx, .pth or .safetensors.

    .onnx takes any number of normalised images and returns logits; ONNX Runtime checks it against torch
    (extra `export`). .pth is a state dict for torchvision's `alexnet`. .safetensors has the same tensors, and
    the class names. The model is a run folder, a checkpoint or a file, as for `owt evaluate`.

    \b
    Example:  owt export runs/first first.onnx
    """
    log_to_stderr()
    require_single_process("owt export")
    with loading():
        from horovod_owt.inference.export import check_export
        from horovod_owt.inference.export import export as export_net
        from horovod_owt.inference.weights import read_trained_model

    check_export(out)
    found = export_net(read_trained_model(checkpoint, newest=newest), out)
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"{found['path']}: {found['model']} of {found['checkpoint']}, {found['bytes'] / 1e6:.1f} MB")
    if "onnxruntime_difference" in found:
        batches = ", ".join(map(str, found["batches_checked"]))
        click.echo(f"ONNX Runtime agrees to {found['onnxruntime_difference']:.1e} (batches of {batches})")
