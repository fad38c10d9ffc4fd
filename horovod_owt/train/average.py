"""An exponential moving average of the weights, often more accurate than the weights of any single step."""

from __future__ import annotations

import torch
from torch import Tensor

from horovod_owt.parallel.step import OneWeirdTrick


class WeightAverage:
    """After each update, average = decay * average + (1 - decay) * weights, from initial weights on.

    Running statistics are averaged like weights. Each rank averages the tensors that it holds, so no
    communication is needed.
    """

    def __init__(self, decay: float, strategy: OneWeirdTrick) -> None:
        self._decay, self._strategy = decay, strategy
        self.tensors = {name: tensor.clone() for name, tensor in self._live().items()}  # names of the model

    def update(self) -> None:
        live = self._live()
        torch._foreach_lerp_(list(self.tensors.values()), list(live.values()), 1 - self._decay)

    def restart(self) -> None:
        """Start again from the current weights."""
        for name, tensor in self._live().items():
            self.tensors[name].copy_(tensor)

    def _live(self) -> dict[str, Tensor]:
        strategy = self._strategy
        named = [*strategy.named_parameters(), *strategy.named_buffers()]
        return {name: tensor.detach() for name, tensor, _ in named if tensor.is_floating_point()}
