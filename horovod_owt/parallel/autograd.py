"""Autograd that begins at a given gradient.

`Tensor.backward` and `torch.autograd.grad` do the same, but compare the shapes of the gradient and its tensor
with functions for symbolic shapes. These load SymPy: half a second of every start. Megatron-LM too calls the
engine like this (`custom_backward` of its pipeline schedules).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_engine = torch.autograd.Variable._execution_engine


def backward(out: Tensor, d_out: Tensor) -> None:
    """Accumulate gradients in the leaves of `out`'s graph; `d_out`, of the same shape, is its own."""
    _run(out, d_out, (), accumulate=True)


def gradients(out: Tensor, inputs: Sequence[Tensor], d_out: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `inputs`, which `out` depends on; `d_out`, of the same shape, is its own."""
    return _run(out, d_out, tuple(inputs), accumulate=False)


def _run(out: Tensor, d_out: Tensor, inputs: tuple[Tensor, ...], *, accumulate: bool) -> tuple[Tensor, ...]:
    assert out.shape == d_out.shape
    return _engine.run_backward(
        (out,),
        (d_out,),
        False,  # keep_graph
        False,  # create_graph
        inputs,
        allow_unreachable=accumulate,
        accumulate_grad=accumulate,
    )
