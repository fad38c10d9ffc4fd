"""An exponential moving average of the weights: often a better net than the weights of any single step."""

from __future__ import annotations

import torch
from torch import Tensor

from horovod_owt.parallel.step import OneWeirdTrick


class WeightAverage:
    """After each update: average = decay * average + (1 - decay) * weights, from the first weights on.

    Running statistics are averaged like weights. Each rank averages the parts that it holds, so the average
    is that of one process and needs no communication.
    """

    def __init__(self, decay: float, strategy: OneWeirdTrick) -> None:
        self._decay, self._strategy = decay, strategy
        self.tensors = {name: tensor.clone() for name, tensor in self._live().items()}  # by names in the net

    def update(self) -> None:
        live = self._live()
        torch._foreach_lerp_(list(self.tensors.values()), list(live.values()), 1 - self._decay)

    def restart(self) -> None:
        """Begin at the present weights."""
        for name, tensor in self._live().items():
            self.tensors[name].copy_(tensor)

    def _live(self) -> dict[str, Tensor]:
        strategy = self._strategy
        named = [*strategy.named_parameters(), *strategy.named_buffers()]
        return {name: tensor.detach() for name, tensor, _ in named if tensor.is_floating_point()}
