"""Optimizer updates that the GPU skips by itself if the loss is not finite.

If the host read the loss before it queued the update, the GPU would be idle meanwhile, in each step. So the
update is queued at once, with a flag on the device that cancels it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skip_flag(loss: Tensor, bad_images: Tensor, *, max_bad: int, norm: Tensor | None = None) -> Tensor:
    """1.0 if loss or norm is NaN or infinite, or more than `max_bad` images are bad; else 0.0."""
    checked = loss if norm is None else loss + norm.float()[0]
    bad_or_nan = torch.add(bad_images, checked, alpha=0)  # 0 * inf is NaN, and NaN compares false
    return (bad_or_nan <= max_bad).logical_not().float()


def divisor(bad_images: Tensor, images: int, *, norm: Tensor | None = None, clip_norm: float = 0.0) -> Tensor:
    """The number by which to divide gradients to get the mean over the good images, clipped to `clip_norm`.

    `norm` is the norm of the mean over all images.
    """
    share = (images - bad_images) / images
    return share if norm is None else torch.maximum(share, norm.float()[0] / clip_norm)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor, divide_by: Tensor | None) -> None:
    """Update with the gradients divided by `divide_by`, unless `skip` is 1.

    The optimizer must be a fused one: these are the tensors that it takes from a gradient scaler.
    """
    optimizer.found_inf, optimizer.grad_scale = skip, divide_by
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale
