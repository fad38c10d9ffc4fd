"""Copies between the host and a GPU for which the host does not wait for work queued before them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory on the host for copies from and to the device: pinned if that is a GPU.

    torch reuses pinned memory only after the copies out of it are done.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def upload(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """`values` on the device, not copied if they are there already.

    A copy to a GPU from memory that is not pinned would make the host wait for all work queued before it.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or tensor.is_cuda:  # memory of a GPU cannot be pinned
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


class Download:
    """A few numbers on their way to the host: `array` waits for them, not for work queued after them."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = host_buffer(tensor.shape, tensor.dtype, tensor.device)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def array(self) -> np.ndarray:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.detach().numpy()
