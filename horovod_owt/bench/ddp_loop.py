"""torch's DistributedDataParallel over its own process group: the baselines of `bench scaling`."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import psutil
import torch
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import alexnet

from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.parallel.runtime import World
from horovod_owt.parallel.step import autocast
from horovod_owt.train.replica import StepReport

LR = 1e-4  # small, so that the loss does not diverge on random labels


class DdpLoop:
    """torchvision's alexnet in a plain training loop on one batch; without DDP in a world of one rank.

    As in torchvision's reference script: contiguous tensors, default SGD. `tuned` adds torch's own options:
    channels_last, fused SGD, gradients as views of DDP's buckets. `compiled` is for torch.compile.
    """

    def __init__(
        self, cfg: TrainConfig, world: World, batch: Batch, *, tuned: bool, compiled: bool = False
    ) -> None:
        memory_format = torch.channels_last if tuned else torch.contiguous_format
        model = alexnet(weights=None, num_classes=cfg.classes, dropout=cfg.dropout)
        model = model.to(world.device, memory_format=memory_format)
        fused = tuned and "fused" in inspect.signature(torch.optim.SGD).parameters  # not in torch 2.0
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=LR,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            **({"fused": True} if fused else {}),
        )
        if world.size > 1:
            switches = {"gradient_as_bucket_view": True, "static_graph": True} if tuned else {}
            model = DistributedDataParallel(model, **switches)
        self._model = torch.compile(model) if compiled else model
        self._images, self._labels = batch.images.contiguous(memory_format=memory_format), batch.labels
        self._label_smoothing = cfg.label_smoothing
        self._autocast = lambda: autocast(cfg.precision, world.device)

    def train_step(self, step: int) -> StepReport:
        """One update; DDP's exposed communication is part of backward and not reported separately."""
        start = perf_counter()
        with self._autocast():
            logits = self._model(self._images)
            loss = F.cross_entropy(logits, self._labels, label_smoothing=self._label_smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        value = loss.item()
        step_s = perf_counter() - start
        return StepReport(loss=value, stop_asked=False, step_s=step_s, data_wait_s=0.0, exposed_comm_s=0.0)


def free_init_method() -> str:
    """A free address on rank 0 for torch.distributed, on the interface that Horovod's Gloo uses."""
    addresses = psutil.net_if_addrs().get(os.environ.get("HOROVOD_GLOO_IFACE", ""), [])
    found = [address.address for address in addresses if address.family == socket.AF_INET]
    host = found[0] if found else socket.gethostbyname(socket.gethostname())
    with socket.create_server((host, 0)) as server:
        return f"tcp://{host}:{server.getsockname()[1]}"


@contextmanager
def torch_process_group(world: World, init_method: str | None) -> Iterator[None]:
    """A torch.distributed process group of these ranks on Horovod's interface; none without `init_method`."""
    if not init_method:
        yield
        return
    if interface := os.environ.get("HOROVOD_GLOO_IFACE"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "gloo" if world.device.type == "cpu" else "nccl"
    dist.init_process_group(backend, init_method, rank=world.rank, world_size=world.size)
    yield
    dist.destroy_process_group()
