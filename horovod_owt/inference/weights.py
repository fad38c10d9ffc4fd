"""Read a trained model: from a run, a checkpoint, a .safetensors file, or a .pth file of torch.

A .pth file is a pickle. It is read by torch's weights-only unpickler, which creates only tensors and plain
containers; nothing else is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from horovod_owt.config import CHOICES, TrainConfig
from horovod_owt.errors import ConfigError, RunError, as_owt_error
from horovod_owt.model import build_model
from horovod_owt.model.alexnet_owt import AlexNetOWT
from horovod_owt.runs.checkpoints import MODEL, checkpoint_to_use, read_state, step_of

log = logging.getLogger(__name__)

WANTED = "a state dict of tensors, as `torch.save(model.state_dict(), FILE)` writes it"
ZIP, PICKLE, SAFETENSORS = b"PK\x03\x04", b"\x80", b"{"  # first bytes of files, of safetensors after 8 bytes
NESTED = ("state_dict", "model_state_dict", "model")  # keys under which training scripts store the state dict


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a trained model besides its weights."""

    source: Path  # the checkpoint folder or the file
    model: str
    classes: int  # outputs
    class_names: tuple[str, ...] = ()  # of the first outputs; empty if unknown
    image_size: int = TrainConfig.image_size  # px, used in training
    step: int | None = None

    def empty_model(self, device: torch.device) -> AlexNetOWT:
        """The model in evaluation mode, with uninitialised weights."""
        with torch.device("meta"):
            model = build_model(self.model, self.classes)
        return model.to_empty(device=device).eval()


@dataclass(frozen=True)
class TrainedModel:
    """A trained model's whole weights, by the names of torchvision's `alexnet`."""

    info: ModelInfo
    weights: dict[str, Tensor]

    def build(self, device: torch.device) -> AlexNetOWT:
        """The model in evaluation mode, with fp32 weights."""
        model = self.info.empty_model(device)
        model.load_state_dict(self.weights)
        return model


def read_trained_model(path: Path, *, newest: bool = False) -> TrainedModel:
    """Read weights from a run folder (its best checkpoint, or the newest), a checkpoint folder, or a file.

    Raises ConfigError if there are no weights of our models, RunError for a damaged checkpoint.
    """
    if path.is_dir():
        return _read_checkpoint(path, newest=newest)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", wanted="a run, a checkpoint or weights") from None
    if head[8:] == SAFETENSORS:
        return _read_safetensors(path)
    if head.startswith((ZIP, PICKLE)) and not tarfile.is_tarfile(path):  # torch unpickles tar files unchecked
        return _model_from(_read_pth(path), path)
    seen = f"is not a file of weights: it begins with {head!r}" if head else "is empty"
    raise ConfigError(f"{path} {seen}", wanted=WANTED)


def _read_checkpoint(path: Path, *, newest: bool) -> TrainedModel:
    while True:
        folder = checkpoint_to_use(path, newest=newest)
        try:
            state, weights = read_state(folder), load_file(folder / MODEL)
            break
        except FileNotFoundError:  # deleted by the run meanwhile
            if folder.exists() or folder == path:
                raise RunError(f"checkpoint {folder} has vanished") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(f"checkpoint {folder}: {error}", wanted="a whole checkpoint") from error
    return _model_from(
        weights,
        folder,
        class_names=tuple(state.get("data", {}).get("classes", ())),
        image_size=state.get("config", {}).get("image_size", TrainConfig.image_size),
        step=step_of(folder),
    )


def _read_safetensors(path: Path) -> TrainedModel:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{path}: {error}", wanted="a whole .safetensors file") from None
    return _model_from(weights, path, **_from_metadata(about))


def metadata(info: ModelInfo) -> dict[str, str]:
    """The metadata of an exported file."""
    return {
        "model": info.model,
        "image_size": str(info.image_size),
        "classes": json.dumps(info.class_names),
        "source": str(info.source),
    }


def _from_metadata(about: Mapping[str, str]) -> dict[str, Any]:
    """`metadata` read from a file; empty for files from other programs."""
    try:
        names = json.loads(about["classes"])
        return {"class_names": tuple(map(str, names)), "image_size": int(about["image_size"])}
    except (KeyError, ValueError, TypeError):
        return {}


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles; unreadable ones raise
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise anything on malformed bytes
        if as_owt_error(error):
            raise
        raise ConfigError(f"{path}: {_why_refused(error)}", wanted=WANTED) from None
    for key in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ConfigError(f"{path} contains a {type(found).__name__}, not a state dict", wanted=WANTED)
    # DistributedDataParallel and DataParallel wrap the model in a module of that name
    return {re.sub(r"\bmodule\.", "", str(name)): tensor for name, tensor in found.items()}


def _why_refused(error: Exception) -> str:
    """The reason, in our words where torch's message advises to load it unchecked."""
    if found := re.search(r"(?:GLOBAL|Unsupported class) (\w+\.[\w.]+)", str(error)):
        return f"contains Python objects ({found[1]}), which are never unpickled"
    if isinstance(error, UnpicklingError):
        return "truncated, or a pickle of other things than tensors"
    return f"truncated or no file of torch ({' '.join(str(error).split())[:200] or type(error).__name__})"


def _model_from(weights: dict[str, Tensor], source: Path, **about: Any) -> TrainedModel:
    """The model that fits the weights' names and shapes; ConfigError if none does, or they are not finite."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    classes = _outputs(shapes)
    candidates = {}
    for model in CHOICES["model"]:
        with torch.device("meta"):
            built = build_model(model, classes or 1)
        candidates[model] = {name: tuple(each.shape) for name, each in built.state_dict().items()}
    for model, wanted in candidates.items():
        if shapes == wanted:
            if bad := next((name for name, each in weights.items() if not each.isfinite().all()), None):
                raise ConfigError(f"{source}: {bad} contains NaN or infinity", wanted="finite weights")
            return TrainedModel(ModelInfo(source, model, classes, **about), weights)
    model, wanted = max(candidates.items(), key=lambda each: len(each[1].items() & shapes.items()))
    odd = next(name for name in [*wanted, *sorted(shapes)] if wanted.get(name) != shapes.get(name))
    has = f"{odd} of shape {shapes[odd]}" if odd in shapes else f"no {odd}"
    raise ConfigError(
        f"{source} has {has}",
        wanted=f"the weights of {model}, with {odd} of shape {wanted[odd]}"
        if odd in wanted
        else f"{model}'s only",
    )


def _outputs(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The outputs of the last layer of the classifier; 0 if there is none."""
    last = re.compile(r"classifier\.(\d+)\.weight")
    numbers = [int(found[1]) for found in map(last.fullmatch, shapes) if found]
    shape = shapes[f"classifier.{max(numbers)}.weight"] if numbers else ()
    return shape[0] if len(shape) == 2 else 0
