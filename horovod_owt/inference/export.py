"""Export a trained model: ONNX, a state dict for torchvision, safetensors."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save

from horovod_owt.data.batch import MEAN, STD
from horovod_owt.errors import ConfigError, RunError, fix_of
from horovod_owt.files import users_file
from horovod_owt.filesystem import temporary_folder
from horovod_owt.inference.weights import ModelInfo, TrainedModel, metadata

TOLERANCE = 1e-4  # of ONNX Runtime's logits, relative to the largest one
BATCHES = (1, 2, 5)  # batch sizes of the check
TORCH_FOR_ONNX = (2, 6)  # the first whose exporter handles all our image sizes


def export(net: TrainedModel, out: Path) -> dict[str, Any]:
    """Write the model to `out` atomically, in the format of its suffix; returns a report. Raises OwtError.

    Call `check_export` first.
    """
    info = net.info
    try:
        with users_file(out, durable=True) as file:
            checked = WRITERS[out.suffix](net, file)
        return {
            "path": str(out),
            "bytes": out.stat().st_size,
            "model": info.model,
            "classes": info.classes,
            "image_size": info.image_size,
            "checkpoint": str(info.source),
            **checked,
        }
    except OSError as error:
        raise RunError(f"{out} not written: {error.strerror or error}", fix=fix_of(error)) from error


def check_export(out: Path) -> None:
    """Raise ConfigError if the format is unknown, or cannot be written here."""
    if out.suffix not in WRITERS:
        raise ConfigError(f"{out}", wanted=f"a name that ends in {', '.join(WRITERS)}")
    if not out.parent.is_dir() or out.is_dir():
        seen = f"{out} is a folder" if out.is_dir() else f"{out}: no folder {out.parent}"
        raise ConfigError(seen, wanted="a file in an existing folder")
    if out.suffix == ".onnx":
        _check_onnx()


def _check_onnx() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_FOR_ONNX:
        raise ConfigError(
            f"ONNX with torch {torch.__version__}",
            wanted=f"torch {'.'.join(map(str, TORCH_FOR_ONNX))} or newer",
            fix="export to .safetensors here, and from that file to .onnx where torch is newer",
        )
    needed = ("onnx", "onnxruntime", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        fix = "pip install 'horovod_owt[export]'"
        raise ConfigError(f"ONNX without {' and '.join(missing)}", wanted="these packages", fix=fix)


def _write_onnx(net: TrainedModel, file: BinaryIO) -> dict[str, Any]:
    """Write an ONNX model, normalised images (any number) -> logits, once it was checked against torch."""
    # ONNX Runtime 1.32 collects usage data for Microsoft, in ~/.cache and TMPDIR, as soon as it is loaded,
    # perhaps by torch's exporter.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnx

    model, side = net.build(torch.device("cpu")), net.info.image_size
    with temporary_folder("owt-export-") as folder:
        path = folder / "net.onnx"
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, side, side),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {**metadata(net.info), **_input_format()})
    content = graph.SerializeToString()
    difference = _onnx_difference(content, model, net.info)
    if not difference <= TOLERANCE:
        raise RunError(f"ONNX Runtime's logits differ by {difference:.1e}", wanted=f"{TOLERANCE:.0e} or less")
    file.write(content)
    return {"onnxruntime_difference": difference, "batches_checked": list(BATCHES)}


def _input_format() -> dict[str, str]:
    return {"input": "RGB in 0..1, minus mean, over std", "mean": json.dumps(MEAN), "std": json.dumps(STD)}


def _onnx_difference(content: bytes, model: torch.nn.Module, info: ModelInfo) -> float:
    """The largest difference of a logit between ONNX Runtime and torch, relative to the largest logit."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    draw, worst = torch.Generator().manual_seed(0), []
    for batch in BATCHES:
        images = torch.randn(batch, 3, info.image_size, info.image_size, generator=draw)
        with torch.inference_mode():
            ours = model(images).numpy()
        (theirs,) = session.run(None, {"images": images.numpy()})
        worst.append(float(np.abs(theirs - ours).max() / max(np.abs(ours).max(), 1e-30)))
    return max(worst)


def _write_pth(net: TrainedModel, file: BinaryIO) -> dict[str, Any]:
    """Write a state dict; that of alexnet-owt can be loaded into torchvision's `alexnet(num_classes=N)`."""
    torch.save(dict(net.weights), file)
    return {}


def _write_safetensors(net: TrainedModel, file: BinaryIO) -> dict[str, Any]:
    """Write the state dict, with classes and image size in the file's metadata."""
    whole = {name: tensor.contiguous() for name, tensor in net.weights.items()}
    file.write(save(whole, metadata={"format": "pt", **metadata(net.info)}))
    return {}


WRITERS: dict[str, Callable[[TrainedModel, BinaryIO], dict[str, Any]]] = {
    ".onnx": _write_onnx,
    ".pth": _write_pth,
    ".safetensors": _write_safetensors,
}
