"""Memory of one device in training: weights, gradients, momentum, and stored activations."""

from __future__ import annotations

from horovod_owt.compression import keeps_errors
from horovod_owt.config import TrainConfig
from horovod_owt.perf.layers import Net
from horovod_owt.perf.network import FC6_IN, HIDDEN
from horovod_owt.perf.traffic import KEPT_BYTES, PASS_BYTES

COPIES = 3  # of the weights: themselves, gradients, momentum


def memory_gb(cfg: TrainConfig, net: Net) -> float:
    """GB (1e9 bytes) per rank, without libraries' workspaces and the driver's context."""
    group_size = cfg.ranks_per_classifier()
    kept, passing = KEPT_BYTES[cfg.precision], PASS_BYTES[cfg.precision]
    weights = net.parameters("conv") + net.parameters("fc") / group_size
    layers = [layer for layer in net.layers() if layer.kind == "conv"]
    image = layers[0].inputs * kept + sum(layer.kept_bytes(passing) for layer in layers)
    rows = cfg.batch * (1 if cfg.owt_scheme == "b" else group_size)
    # per row: the features and their gradient, fc6's own units, all units of fc7 before their sum, the logits
    row = (2 * FC6_IN + 2 * HIDDEN / group_size + HIDDEN) * passing + 2 * net.classes * kept
    errors = net.parameters("fc") if keeps_errors(cfg.compression) else 0  # of each rank; owners' are a share
    return ((COPIES * weights + errors) * kept + cfg.batch * image + rows * row) / 1e9
