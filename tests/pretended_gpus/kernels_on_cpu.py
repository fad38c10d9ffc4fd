"""Compute on pretended GPUs: every operation on CUDA tensors runs on the CPU, in the same memory.

A pretended GPU's memory is host memory and its kernels cannot run (stand_ins/gpu.cc). While `KernelsOnCpu` is
entered, an operator that would launch one gets CPU tensors over the same bytes instead. Allocations, views,
streams and events stay torch's own CUDA code.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_"}
NOT_KERNELS = ALLOCATIONS | {"record_stream", "is_pinned", "_pin_memory"}


class KernelsOnCpu(TorchDispatchMode):
    """Entered for the whole of a rank; autograd's threads inherit it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        device = _device_of_result(tensors, kwargs)
        if not (device or any(tensor.is_cuda for tensor in tensors)) or _needs_no_kernel(func):
            return func(*args, **kwargs)
        torch.cuda.current_stream().synchronize()  # the stream's earlier work: ours runs at once
        twins: dict[int, Tensor] = {}  # id of a CPU twin -> its CUDA tensor

        def to_cpu(value):
            if isinstance(value, Tensor) and value.is_cuda:
                twin = cpu_twin(value)
                twins[id(twin)] = value
                return twin
            return torch.device("cpu") if isinstance(value, torch.device) else value

        def from_cpu(value):
            if not isinstance(value, Tensor):
                return value
            return twins.get(id(value), on_gpu(value, device) if device else value)

        cpu_args, cpu_kwargs = tree_map(to_cpu, (args, kwargs))
        return tree_map(from_cpu, func(*cpu_args, **cpu_kwargs))


def _device_of_result(tensors: list[Tensor], kwargs: dict) -> torch.device | None:
    """The GPU that a new tensor belongs on; None for the CPU."""
    if (asked := kwargs.get("device")) is not None:
        asked = torch.device(asked)
        return asked if asked.type == "cuda" else None
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


def _needs_no_kernel(func) -> bool:
    """An allocation, or a view: what returns its input's memory without writing to it."""
    if func._schema.name.removeprefix("aten::") in NOT_KERNELS:
        return True
    returns = func._schema.returns
    return bool(returns) and all(
        one.alias_info is not None and not one.alias_info.is_write for one in returns
    )


def cpu_twin(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same memory as a pretended GPU's."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    twin = torch.empty(0, dtype=tensor.dtype)
    return twin.set_(bytes_, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_gpu(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a pretended GPU, with the same strides."""
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    cpu_twin(copy).copy_(tensor)
    return copy
