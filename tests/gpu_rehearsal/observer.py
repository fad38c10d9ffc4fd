"""What an operation on fake CUDA tensors would cost: kernels, copies, and waits of the host for the GPU."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from collectives import Collectives, Refused
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = "/horovod_owt/"
GPU = torch.device("cuda:0")
VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "expand", "lift_fresh"),
    *("narrow", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose"),
    *("unfold", "unsqueeze", "view"),
}
NO_KERNEL = VIEWS | {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "set_",
    "resize_",
}
READS_BACK = {
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "equal",
}  # the host needs the size
KINDS = {"i": torch.int64, "u": torch.int64, "f": torch.float32, "b": torch.bool}


@dataclass
class Seen:
    """Counts by the line of the project that caused them."""

    host_syncs: Counter[str] = field(default_factory=Counter)  # the host waits for the GPU
    blocking_copies: Counter[str] = field(default_factory=Counter)  # to the GPU; also a wait
    pageable_copies: Counter[str] = field(
        default_factory=Counter
    )  # to the GPU, from memory that is not pinned
    kernels: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)  # all between host and GPU

    def totals(self) -> dict[str, int]:
        return {name: sum(counts.values()) for name, counts in vars(self).items()}

    def clear(self) -> None:
        for counts in vars(self).values():
            counts.clear()


class Observer(TorchDispatchMode):
    """Sees every operation before FakeTensorMode does."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.collectives, self.seen = collectives, Seen()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "_local_scalar_dense":
            if args[0].is_cuda:
                self.count(self.seen.host_syncs, "item")
            return 0.5 if args[0].is_floating_point() else 1
        if name in READS_BACK and args[0].is_cuda:
            self.count(self.seen.host_syncs, name)
        pinned = kwargs.pop("pin_memory", False) or name == "_pin_memory"
        if name == "_pin_memory":
            if args[0].is_cuda:
                raise Refused(f"only memory of the host can be pinned; {place()}")
            return _mark_pinned(args[0].clone())
        if func.namespace == "aten" and not name.startswith(("sym_", "is_")):
            self._count_work(name, args, kwargs, tensors)
            if name not in VIEWS:
                self._check_races(func, args, kwargs)
        if name == "_fused_sgd_":  # torch has no rule for its shapes
            return self._check_fused_sgd(tensors)
        if name == "record_stream":
            return None
        result = func(*args, **kwargs)
        return _mark_pinned(result) if pinned else result

    def count(self, counter: Counter[str], what: str) -> None:
        counter[f"{place()}: {what}"] += 1

    def _count_work(self, name, args, kwargs, tensors) -> None:
        to = kwargs.get("device")
        on_gpu = any(tensor.is_cuda for tensor in tensors) or (to and torch.device(to).type == "cuda")
        if on_gpu and name not in NO_KERNEL and not self._copy(name, args, kwargs):
            self.count(self.seen.kernels, name)

    def _copy(self, name, args, kwargs) -> bool:
        """Count a copy between host and GPU; whether it was one."""
        if name == "_to_copy":
            source, to = args[0], torch.device(kwargs.get("device") or args[0].device)
            dtype, blocking = kwargs.get("dtype") or source.dtype, not kwargs.get("non_blocking")
        elif name == "copy_":
            source, to, dtype = args[1], args[0].device, args[0].dtype
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            return False
        if source.device.type == to.type:
            return False
        what = str(source.dtype)[6:]
        self.count(self.seen.copies, what)
        if to.type == "cpu":
            if blocking:
                self.count(self.seen.host_syncs, f"{what} to the host")
            return True
        if blocking:
            self.count(self.seen.blocking_copies, what)
        if not is_pinned(source):
            cast = f", cast to {str(dtype)[6:]} on the CPU" if dtype != source.dtype else ""
            self.count(self.seen.pageable_copies, what + cast)
        return True

    def _check_fused_sgd(self, tensors) -> None:
        """Weights, gradients and momentum are alike; scale and flag are single numbers."""
        kinds = {(tensor.device, tensor.dtype) for tensor in tensors if tensor.dim()}
        if len(kinds) > 1 or any(tensor.device != GPU for tensor in tensors):
            raise Refused(f"the fused update gets {sorted(map(str, kinds))}; {place()}")

    def _check_races(self, func, args, kwargs) -> None:
        if not self.collectives.flights:
            return
        values = [*args, *kwargs.values()]
        by_name = {argument.name: argument for argument in func._schema.arguments}
        arguments = [*func._schema.arguments[: len(args)], *(by_name.get(name) for name in kwargs)]
        for value, argument in zip(values, arguments, strict=False):
            writes = argument is not None and argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    what = f"{place()}: {func}"
                    self.collectives.check_access(tensor, writes=writes, what=what)


def place() -> str:
    """The innermost line of the project on the stack: file and number."""
    frame = sys._getframe(1)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.partition(PACKAGE)
        if found:
            return f"{path.rpartition(PACKAGE)[2] or path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _mark_pinned(tensor: Tensor) -> Tensor:
    tensor.is_pinned_here = True
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "is_pinned_here", False) or (
        not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu" and tensor.is_pinned()
    )


def patch_torch(observer: Observer, patch) -> None:
    """Where torch looks into memory, or swaps the storage of parameters; `patch` is pytest's monkeypatch."""
    real_tolist, real_numpy, seen = Tensor.tolist, Tensor.numpy, observer.seen

    def tolist(tensor):
        """Zeros: no stop asked, no bad image, a finite loss."""
        if not isinstance(tensor, FakeTensor):
            return real_tolist(tensor)
        if tensor.is_cuda:
            observer.count(seen.host_syncs, "tolist")
        if hasattr(tensor, "numbers"):
            return list(tensor.numbers)
        return np.zeros(tuple(tensor.shape)).tolist()

    def numpy(tensor):
        """Memory of its own, for code that fills a buffer in place."""
        if not isinstance(tensor, FakeTensor):
            return real_numpy(tensor)
        if tensor.is_cuda:
            raise Refused(f"numpy reads memory of the host only; {place()}")
        return np.zeros(tuple(tensor.shape), str(tensor.dtype)[6:])

    def new_tensor(tensor, data):
        """torch makes it on the CPU in pageable memory, copies it, and waits for the stream."""
        made = tensor.new_empty(np.shape(data))
        if tensor.is_cuda:
            observer.count(seen.blocking_copies, f"new_tensor {made.numel()} x {str(made.dtype)[6:]}")
        return made

    def tensor_of(data, *, dtype=None, device=None):
        """Without its numbers, but for a list on the CPU: the splits of an alltoall are read."""
        made = torch.empty(np.shape(data), dtype=dtype or KINDS[np.asarray(data).dtype.kind], device=device)
        if made.is_cuda:
            observer.count(seen.blocking_copies, f"torch.tensor {np.shape(data)}")
        made.numbers = data
        return made

    def apply(module, fn, recurse=True):
        """torch's own swaps the data of parameters, which fake tensors do not allow."""
        for child in module.children():
            child._apply(fn)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    moved = fn(parameter)
                if moved is not parameter:
                    module._parameters[key] = torch.nn.Parameter(moved, parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = fn(buffer)
        return module

    def load_state_dict(module, state, strict=True, assign=False):
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        assert own.keys() == state.keys(), own.keys() ^ state.keys()
        with torch.no_grad():
            for name, tensor in state.items():
                assert own[name].shape == tensor.shape, (name, own[name].shape, tensor.shape)
                own[name].copy_(tensor)

    def waits(what):
        return lambda *args, **kwargs: observer.count(seen.host_syncs, what)

    patch.setattr(torch, "tensor", tensor_of)
    patch.setattr(Tensor, "tolist", tolist)
    patch.setattr(FakeTensor, "tolist", tolist, raising=False)
    patch.setattr(Tensor, "numpy", numpy)
    patch.setattr(FakeTensor, "numpy", numpy, raising=False)
    patch.setattr(Tensor, "new_tensor", new_tensor)
    patch.setattr(torch.nn.Module, "_apply", apply)
    patch.setattr(torch.nn.Module, "load_state_dict", load_state_dict)
    patch.setattr(torch._subclasses.fake_tensor, "init_gpu_context", lambda *_: None, raising=False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(torch.cuda, "synchronize", waits("synchronize"))
    patch.setattr(torch.cuda.Event, "synchronize", waits("event"))
    patch.setattr(torch.cuda.Stream, "synchronize", waits("stream"))
