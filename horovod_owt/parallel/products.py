"""Matrix products of the fully connected layers: on x86 cores in fp32 by oneDNN, else by torch's default.

torch leaves these products to MKL, which takes the AVX2 path on cores of AMD with AVX-512, and repacks large
matrices for a few rows; convolutions are oneDNN's already. docs/performance.md has both libraries' times.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Rows of a weight gradient that are computed at a time: small enough to stay in a cache until they are copied
# to their place (the operator returns new memory), and for malloc to give the same memory again.
CHUNK_BYTES = 8 << 20


def times_weight(x: Tensor, weight: Tensor, *, units_first: bool = False) -> Tensor:
    """x (R, n_in) times weight (n_out, n_in) transposed: (R, n_out), on a CPU in memory as (n_out, R).

    For small R on a CPU, W x^T takes less time than x W^T, which would repack all the weights. On a GPU the
    transposition costs an extra kernel; `units_first` asks for it where units are to be sent.
    """
    if x.is_cuda and not units_first:
        return x @ weight.t()
    if _by_onednn(weight):
        return _onednn(weight, x.contiguous()).t()
    return (weight @ x.t().contiguous()).t()


def times_weight_back(d_out: Tensor, weight: Tensor) -> Tensor:
    """d_out (R, n_out) times weight (n_out, n_in): (R, n_in)."""
    if _by_onednn(weight) and _cpu() == "AVX512":  # with AVX2 it takes up to 1.6 times as long as MKL
        return _onednn(d_out.contiguous(), weight.t())
    return d_out @ weight


def weight_gradient(d_out: Tensor, x: Tensor, into: Tensor, *, add: bool = False) -> None:
    """d_out (R, n_out) transposed times x (R, n_in), written or added to `into` (n_out, n_in)."""
    if not _by_onednn(into):
        if add:
            into.addmm_(d_out.t(), x)
        else:
            torch.mm(d_out.t(), x, out=into)
        return
    d_t, x_t = d_out.t().contiguous(), x.t().contiguous()
    rows = max(1, CHUNK_BYTES // (into.element_size() * into.shape[1]))
    for part, d_part in zip(into.split(rows), d_t.split(rows), strict=True):
        product = _onednn(d_part, x_t)
        if add:
            part.add_(product)
        else:
            part.copy_(product)


def _by_onednn(matrix: Tensor) -> bool:
    return matrix.dtype == torch.float32 and matrix.device.type == "cpu" and _cpu().startswith("AVX")


@cache
def _cpu() -> str:
    """torch's name of the vector instructions that it uses; empty where oneDNN cannot be called."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return ""
    return torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends, "cpu") else ""  # torch 2.0


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """a times b transposed: the operator that torch.compile uses for linear layers on CPUs."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
