"""Counter-based random numbers: a function of their keys, not of the order of the draws.

Computed here (splitmix64, Steele et al. 2014), so that a new library version does not change a run.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(words: np.ndarray) -> np.ndarray:
    """Mix 64-bit words: a bijection in which every input bit affects every output bit. Arrays only."""
    words = (words ^ (words >> np.uint64(30))) * _FACTORS[0]
    words = (words ^ (words >> np.uint64(27))) * _FACTORS[1]
    return words ^ (words >> np.uint64(31))


def hashed(*words) -> np.ndarray:
    """One 64-bit hash per row of integers (scalars broadcast, negative ones wrap)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix((state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return state


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each key (n,): (n, count) float64, each with 53 random bits."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (mix(keys[:, None] + counters) >> np.uint64(11)) * 2.0**-53
