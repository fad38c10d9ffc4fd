"""Dropout keyed by sample: whether a unit is zeroed depends on the seed, the sample and the unit.

A sample is identified by its position in the endless stream of samples, so the draws do not depend on the
number of ranks, on the rank that holds the sample or the unit, on the device, or on where a run resumed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from horovod_owt.data.hashing import hashed

_PURPOSE = 2  # separates these draws from those of order and augmentation
_LOW = np.uint64(0xFFFFFFFF)


def sample_keys(seed: int, positions: np.ndarray) -> np.ndarray:
    """(rows, 2) int32: 64 random bits for each position in the stream of samples."""
    words = hashed(_PURPOSE, seed, positions)
    halves = np.stack([words >> np.uint64(32), words & _LOW], axis=1)
    return halves.astype(np.uint32).view(np.int32)


def keep_scale(keys: Tensor, layer: int, units: range, dropout: float) -> Tensor:
    """Factors for activations: 0 with probability `dropout`, else 1 / (1 - dropout).

    Shapes    keys (rows, 2) int32 on the device, of `sample_keys` -> (rows, len(units)) float32
    Source    Ellis' lowbias32 (nullprogram.com/blog/2018/07/31); torch lacks unsigned words on some
              devices, so shifts of signed words are masked
    """
    unit = torch.arange(units.start, units.stop, dtype=torch.int32, device=keys.device)
    unit = _mix((unit * 16 + layer) * -1640531527)  # 2**32 / golden ratio, spreads neighbours
    words = unit[None, :] ^ keys[:, :1]
    words = _mix(words)
    words += keys[:, 1:]
    words = _mix(words)
    threshold = round(dropout * 2**32) - 2**31  # of a signed word
    return (words >= threshold).float().mul_(1 / (1 - dropout))


def _mix(words: Tensor) -> Tensor:
    """Mix 32-bit words in place: a bijection in which every input bit affects every output bit."""
    words ^= (words >> 16) & 0xFFFF
    words *= 0x7FEB352D
    words ^= (words >> 15) & 0x1FFFF
    words *= -2073254261  # 0x846ca68b as a signed word
    words ^= (words >> 16) & 0xFFFF
    return words
