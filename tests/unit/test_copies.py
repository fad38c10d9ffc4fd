"""Copies to a GPU."""

from types import SimpleNamespace

import numpy as np
import torch

from horovod_owt.data.copies import upload

GPU = torch.device("cuda:0")


def test_what_is_on_the_gpu_is_not_pinned():
    """nvJPEG's pixels; torch refuses to pin them."""
    pixels = SimpleNamespace(is_cuda=True)
    assert upload(pixels, GPU) is pixels


def test_what_is_on_the_host_is_copied_from_pinned_memory(monkeypatch):
    pinned = SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    assert upload(np.arange(3), GPU) == (GPU, True)
