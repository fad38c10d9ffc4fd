"""From encoded batches to normalised images on the device: DALI, or torchvision as the reference."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from horovod_owt.errors import ConfigError

if TYPE_CHECKING:
    from horovod_owt.data.batch import Pipeline
    from horovod_owt.data.feed import Feed

log = logging.getLogger(__name__)


def make_pipeline(
    kind: str, feed: Feed, *, image_size: int, device_id: int | None, num_threads: int
) -> Pipeline:
    """A pipeline over `feed`, with its batch size; `kind` is dali, torchvision, or auto (DALI if installed).

    `device_id` is the CUDA device that decodes and receives the batches, None the CPU. Of a feed with decoded
    images nothing is left to decode: either kind gets the same pipeline.
    """
    if resolve_kind(kind) == "dali" and not feed.decoded:
        from horovod_owt.data.pipeline_dali import DaliPipeline as Kind
    else:
        from horovod_owt.data.pipeline_torchvision import TorchvisionPipeline as Kind
    return Kind(feed, image_size=image_size, device_id=device_id, num_threads=num_threads)


def resolve_kind(kind: str) -> str:
    """`dali` or `torchvision`, with auto resolved; ConfigError if unknown or not installed."""
    if kind not in ("dali", "torchvision", "auto"):
        raise ConfigError(f"pipeline={kind}", wanted="dali, torchvision or auto")
    if kind == "torchvision" or _dali_is_installed():
        return "torchvision" if kind == "torchvision" else "dali"
    if kind == "dali":
        fix = "run launch/setup, or --set pipeline=torchvision"
        raise ConfigError("pipeline=dali, but DALI is not installed", fix=fix)
    log.warning("DALI is not installed: using the slower torchvision pipeline")
    return "torchvision"


def _dali_is_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
