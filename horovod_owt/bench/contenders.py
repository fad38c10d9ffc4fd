"""The contenders of `bench scaling`, in this process or in a helper process without Horovod.

Horovod's background thread polls all ranks a thousand times a second, which costs a rank 10 to 20 % of a core
even when idle. Training with Horovod pays that; torch's DDP and a single rank do not. So these run in a
helper process while the process with Horovod is stopped.
"""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import psutil
import torch

from horovod_owt.bench.blocks import finish_queued_work
from horovod_owt.bench.ddp_loop import LR, DdpLoop, torch_process_group
from horovod_owt.bench.request import PEERS
from horovod_owt.config import TrainConfig
from horovod_owt.data.batch import Batch
from horovod_owt.parallel.runtime import World
from horovod_owt.train.replica import Replica, StepReport

PR_SET_PDEATHSIG = 1  # Linux prctl: the signal to get when the parent dies


class Name(NamedTuple):
    """A contender: a strategy on all ranks of the job, or on rank 0 only."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.strategy} x{self.ranks}"


def build(name: Name, cfg: TrainConfig, world: World) -> Callable[[int], StepReport]:
    """The contender's training step, on one fixed batch of random images: no input pipeline."""
    own_world = world if name.ranks == world.size else single_rank_world(world)
    batch = random_batch(cfg, world)
    if name.strategy in PEERS:
        return DdpLoop(cfg, own_world, batch, tuned=name.strategy == "ddp-tuned").train_step
    if name.strategy == "data":
        cfg = dataclasses.replace(cfg, parallel="data", fc_batch="global")
    replica, images = Replica(cfg, own_world), cfg.global_batch(own_world.size)
    return lambda step: replica.train_step(lambda: batch, consumed=step * images, lr=LR)


class HelperProcess:
    """A process without Horovod; this process is stopped (SIGSTOP) while the helper runs steps."""

    def __init__(self, cfg: TrainConfig, world: World, init_method: str | None) -> None:
        """`init_method` is that of torch's process group, if one is needed."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._stops_itself = world.size > 1  # a single rank has no peers to poll, and its shell may notice
        plain_world = dataclasses.replace(world, process_sets=())
        self._process = context.Process(
            target=_serve, args=(theirs, cfg, plain_world, init_method, self._stops_itself), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()

    def run(self, name: Name, steps: range) -> list[StepReport]:
        """Run these steps of the contender, which is built on first use."""
        self._connection.send((name, steps))
        if self._stops_itself:
            signal.raise_signal(signal.SIGSTOP)  # until the helper sends CONT
        return self._receive()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()

    def _receive(self) -> list[StepReport]:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("the helper process of the benchmark has died") from None
        if isinstance(answer, str):
            raise RuntimeError(f"in the helper process of the benchmark: {answer}")
        return answer


def _serve(
    connection: Connection, cfg: TrainConfig, world: World, init_method: str | None, stop_parent: bool
) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(world.threads)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # torch's NCCL and autograd take the current one
    parent, contenders = psutil.Process(os.getppid()), {}
    with torch_process_group(world, init_method):
        connection.send([])
        while (request := connection.recv()) is not None:
            name, steps = request
            while stop_parent and parent.status() != psutil.STATUS_STOPPED:
                time.sleep(1e-3)
            try:
                if name not in contenders:
                    contenders[name] = build(name, cfg, world)
                answer = [contenders[name](step) for step in steps]
                finish_queued_work(world.device)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)
            if stop_parent:
                parent.send_signal(signal.SIGCONT)


def single_rank_world(world: World) -> World:
    """This rank as a job of one rank."""
    return dataclasses.replace(world, rank=0, size=1, local_rank=0, local_size=1, process_sets=())


def random_batch(cfg: TrainConfig, world: World) -> Batch:
    """A batch of random images and labels on the device, different on each rank."""
    torch.manual_seed(cfg.seed + world.rank)
    images = torch.randn(cfg.batch, 3, cfg.image_size, cfg.image_size, device=world.device)
    return Batch(
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(cfg.classes, (cfg.batch,), device=world.device),
        torch.ones(cfg.batch, dtype=torch.bool, device=world.device),
        np.arange(cfg.batch),
    )
