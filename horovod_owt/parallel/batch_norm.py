"""Batch normalisation over one rank's batch or all ranks' batches, for whole and for split layers.

`hvd.SyncBatchNorm` runs on GPUs only; this one costs a small allreduce forward and one backward, on any
device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.traffic import Traffic, start_sum


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are taken over all ranks of a group."""

    def __init__(self, module: nn.BatchNorm2d, group: Group, traffic: Traffic, name: str) -> None:
        super().__init__(module.num_features, eps=module.eps, momentum=module.momentum)
        self.weight, self.bias = module.weight, module.bias
        self.running_mean, self.running_var = module.running_mean, module.running_var
        self.num_batches_tracked = module.num_batches_tracked
        self._over = (group, traffic, name)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        normed, mean, var = _NormalizeOverRanks.apply(x, self.weight, self.bias, self.eps, *self._over)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        self.num_batches_tracked += 1
        return normed


def synchronize_batch_norms(convolutions: nn.Sequential, group: Group, traffic: Traffic) -> None:
    """Replace the BatchNorm2d layers of `convolutions` with ones synchronised over the group."""
    for number, module in enumerate(convolutions):
        if isinstance(module, nn.BatchNorm2d):
            convolutions[number] = SyncBatchNorm2d(module, group, traffic, f"sync_bn.features.{number}")


class UnitNorm:
    """`nn.BatchNorm1d` in training, over the units that a weight shard holds: (R, n_own) -> (R, n_own).

    The rows are several ranks' batches. Statistics are per rank's batch, as in data parallelism, or with
    `over` per unit over all rows of all ranks in that group (the ranks that hold the same units). Running
    statistics are updated once per micro-batch, with the mean over its ranks' batches.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        buffers: dict[str, Tensor],
        module: nn.BatchNorm1d,
    ) -> None:
        self.weight, self.bias = parameters["weight"], parameters["bias"]
        self._buffers = buffers
        self._eps, self._momentum = module.eps, module.momentum
        self.over: tuple[Group, Traffic, str] | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []  # mean and unbiased variance of each batch

    def __call__(self, z: Tensor, batches: int) -> Tensor:
        """`z` normalised; its rows are `batches` consecutive batches of equal size."""
        if self.over:
            normed, *seen = _NormalizeOverRanks.apply(z, self.weight, self.bias, self._eps, *self.over)
            self._seen.append(tuple(seen))
            return normed
        normed = []
        for batch in z.chunk(batches):
            var, mean = torch.var_mean(batch.detach(), dim=0)
            self._seen.append((mean, var))
            normed.append(
                F.batch_norm(batch, None, None, self.weight, self.bias, training=True, eps=self._eps)
            )
        return torch.cat(normed)

    def end_micro_batch(self) -> None:
        """Update the running statistics with this micro-batch's."""
        for name, seen in zip(("running_mean", "running_var"), zip(*self._seen, strict=True), strict=True):
            self._buffers[name].lerp_(torch.stack(seen).mean(dim=0), self._momentum)
        self._buffers["num_batches_tracked"] += 1
        self._seen = []


class _NormalizeOverRanks(torch.autograd.Function):
    """x normalised over the ranks and all dimensions but 1; also returns the mean and unbiased variance.

    Every rank must have the same number of rows. Moments are summed in float64, so that the variance keeps
    fp32 precision.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group: Group, traffic: Traffic, name: str):
        dims = [d for d in range(x.dim()) if d != 1]
        count = group.size * x.numel() // x.shape[1]
        var, mean = torch.var_mean(x.to(weight.dtype), dim=dims, correction=0)
        mean, var = mean.double(), var.double()
        moments = torch.stack([mean, var + mean.square()])
        mean, square = _sum(moments, group, traffic, f"{name}.forward") / group.size
        var = square - mean.square()
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        mean, invstd = mean.to(weight.dtype), (var + eps).rsqrt().to(weight.dtype)
        normed = (x - mean.view(shape)) * invstd.view(shape)
        ctx.save_for_backward(normed, weight, invstd)
        ctx.over, ctx.count, ctx.dims, ctx.shape = (group, traffic, f"{name}.backward"), count, dims, shape
        unbiased = (var * (count / max(1, count - 1))).to(weight.dtype)
        ctx.mark_non_differentiable(mean, unbiased)
        return (normed * weight.view(shape) + bias.view(shape)).to(x.dtype), mean, unbiased

    @staticmethod
    def backward(ctx, d_out, _d_mean, _d_var):
        normed, weight, invstd = ctx.saved_tensors
        d_normed = d_out.to(weight.dtype)
        own = torch.stack([d_normed.sum(ctx.dims), (d_normed * normed).sum(ctx.dims)])
        d_bias, d_weight = own
        mean, mean_normed = _sum(own.double(), *ctx.over).to(weight.dtype) / ctx.count
        d_x = d_normed - mean.view(ctx.shape) - normed * mean_normed.view(ctx.shape)
        d_x = d_x * (weight * invstd).view(ctx.shape)
        return d_x.to(d_out.dtype), d_weight, d_bias, None, None, None, None


def _sum(values: Tensor, group: Group, traffic: Traffic, name: str) -> Tensor:
    return start_sum(values, group, traffic, what="batch norm", name=name).wait()
