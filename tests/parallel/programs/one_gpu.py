"""gpus.py, for training: torch believes in the GPU, and computes on the CPU."""

import dataclasses

import torch

from horovod_owt.parallel import runtime
from horovod_owt.parallel.device import CPU

init = runtime.init
runtime.init = lambda device, **options: init(dataclasses.replace(device, name=CPU.name, gpu=None), **options)
torch.cuda.is_available = lambda: True
torch.cuda.get_arch_list = lambda: ["sm_37"]
runtime.nccl_version = lambda: 23007

import gpus  # noqa: E402, F401
