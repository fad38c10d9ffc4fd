"""Gradients from a given gradient: torch's own, without what torch loads for them."""

import subprocess
import sys

import pytest
import torch

from horovod_owt.parallel import autograd


def product(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, d_out = (torch.randn(4, 4, generator=generator) for _ in range(3))
    return x.requires_grad_(), w.requires_grad_(), (x @ w).tanh(), d_out


def test_backward_accumulates_as_torch_does():
    x, w, out, d_out = product()
    autograd.backward(out, d_out)
    autograd.backward((x @ w).tanh(), d_out)
    ours = x.grad, w.grad
    x, w, out, d_out = product()
    out.backward(d_out)
    assert all(torch.equal(grad, 2 * theirs) for grad, theirs in zip(ours, (x.grad, w.grad), strict=True))


def test_gradients_are_torchs_and_are_not_accumulated():
    x, w, out, d_out = product()
    ours = autograd.gradients(out, [w, x], d_out)
    assert x.grad is None and w.grad is None
    x, w, out, d_out = product()
    assert all(map(torch.equal, ours, torch.autograd.grad(out, [w, x], d_out)))


@pytest.mark.skipif(torch.__version__ < "2.1", reason="torch 2.0 loads SymPy for a pass itself")
def test_a_training_step_does_not_load_sympy():
    code = """
import sys
import numpy as np, torch
from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.parallel.runtime import World
from horovod_owt.train.replica import Replica

replica = Replica(
    TrainConfig(batch=2, classes=2, image_size=63, model="alexnet-owt-bn", parallel="data"),
    World(0, 1, 0, 1, "here", torch.device("cpu"), threads=1),
)
images = torch.zeros(2, 3, 63, 63).contiguous(memory_format=torch.channels_last)
batch = Batch(images, torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool), np.arange(2))
replica.train_step(lambda: batch, consumed=0, lr=0.1)
sys.exit("sympy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
