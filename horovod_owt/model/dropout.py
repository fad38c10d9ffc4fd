"""Dropout keyed by sample: whether a unit is zeroed depends on the seed, the sample and the unit.

A sample is identified by its position in the endless stream of samples, so the draws do not depend on the
number of ranks, on the rank that holds the sample or the unit, on the device, or on where a run resumed.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from horovod_owt.data.copies import upload
from horovod_owt.data.hashing import hashed

log = logging.getLogger(__name__)

_PURPOSE = 2  # makes these draws independent of those of order and augmentation
_LOW = np.uint64(0xFFFFFFFF)

# `_keep_scale_plain` for one element, with the same names: one CUDA kernel instead of 28.
FUSED_SOURCE = """
template <typename T> T keep_scale(T unit, T low, T high, T threshold, T scale_bits) {
    unsigned int word = (unsigned int)unit ^ (unsigned int)low;
    for (int round = 0; round < 2; ++round) {
        word ^= word >> 16;
        word *= 0x7FEB352Du;
        word ^= word >> 15;
        word *= 0x846CA68Bu;
        word ^= word >> 16;
        if (round == 0) word += (unsigned int)high;
    }
    return (int)word >= (int)threshold ? scale_bits : 0;
}
"""


def sample_keys(seed: int, positions: np.ndarray) -> np.ndarray:
    """64 random bits for each position in the stream of samples: (rows, 2) int32."""
    words = hashed(_PURPOSE, seed, positions)
    halves = np.stack([words >> np.uint64(32), words & _LOW], axis=1)
    return halves.astype(np.uint32).view(np.int32)


def keys_on(device: torch.device, seed: int, positions: np.ndarray) -> Tensor:
    """`sample_keys`, on the device."""
    return upload(sample_keys(seed, positions), device)


def keep_scale(keys: Tensor, layer: int, units: range, dropout: float) -> Tensor:
    """Factors for activations: 0 with probability `dropout`, else 1 / (1 - dropout).

    Shapes    keys (rows, 2) int32 on the device, from `sample_keys` -> (rows, len(units)) float32
    Source    lowbias32 by Wellons (nullprogram.com/blog/2018/07/31)
    """
    kernel = fused_kernel(keys.device) if keys.is_cuda else None
    return (kernel or _keep_scale_plain)(keys, _unit_words(layer, units, keys.device), dropout)


@cache
def _unit_words(layer: int, units: range, device: torch.device) -> Tensor:
    """A random word for each unit of a layer: (1, units) int32."""
    unit = torch.arange(units.start, units.stop, dtype=torch.int32, device=device)
    return _mix((unit * 16 + layer) * -1640531527)[None, :]  # 2**32 / golden ratio, spreads neighbours


def _keep_scale_plain(keys: Tensor, unit_words: Tensor, dropout: float) -> Tensor:
    words = _mix(unit_words ^ keys[:, :1])
    words += keys[:, 1:]
    words = _mix(words)
    return (words >= _threshold(dropout)).float().mul_(1 / (1 - dropout))


def _mix(words: Tensor) -> Tensor:
    """Hash int32 words in place by lowbias32; masks make the arithmetic shifts logical ones."""
    words ^= (words >> 16) & 0xFFFF
    words *= 0x7FEB352D
    words ^= (words >> 15) & 0x1FFFF
    words *= -2073254261  # 0x846ca68b as a signed word
    words ^= (words >> 16) & 0xFFFF
    return words


def _threshold(dropout: float) -> int:
    """Units whose hash, as a signed word, is below this are dropped."""
    return round(dropout * 2**32) - 2**31


@cache
def fused_kernel(device: torch.device) -> Callable[[Tensor, Tensor, float], Tensor] | None:
    """`_keep_scale_plain` as one kernel, compiled by torch's jiterator; None if it does not work here.

    The jiterator is a beta feature of torch, so its first result is checked.
    """
    compiled = torch.cuda.jiterator._create_jit_fn(FUSED_SOURCE, threshold=0, scale_bits=0)

    def fused(keys: Tensor, unit_words: Tensor, dropout: float) -> Tensor:
        bits = compiled(
            unit_words,
            keys[:, :1],
            keys[:, 1:],
            threshold=_threshold(dropout),
            scale_bits=struct.unpack("i", struct.pack("f", 1 / (1 - dropout)))[0],
        )
        return bits.view(torch.float32)

    keys, unit_words = keys_on(device, 0, np.arange(64)), _unit_words(0, range(64), device)
    try:
        if torch.equal(fused(keys, unit_words, 0.3), _keep_scale_plain(keys, unit_words, 0.3)):
            return fused
        fault = "it computes other values than torch's operations"
    except RuntimeError as error:
        fault = str(error).partition("\n")[0]
    log.warning("dropout is slower, in many small kernels: the fused one fails on this GPU: %s", fault)
    return None
