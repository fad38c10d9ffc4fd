"""The samples that a step reads: a pure function of seed and position.

Training is one endless stream, epoch after epoch; a position is the number of samples consumed so far.
Every step takes the next `global_batch` positions, every rank its slice of them. So the samples of a step do
not depend on the number of ranks, and a run may stop at any position and resume there on other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from horovod_owt.data.hashing import hashed, mix

ROUNDS = 8


class SampleOrder:
    """The endless stream of sample indices: one permutation of range(num_samples) for each epoch.

    Nothing is stored: epoch e is a Feistel network keyed by (seed, e) over the smallest power of two that is
    at least num_samples. Values outside the range are permuted again until they are inside ("cycle walking",
    Black and Rogaway 2002), which leaves a permutation of the range.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        assert num_samples > 0
        self.num_samples = num_samples
        self.seed = seed
        bits = (num_samples - 1).bit_length()
        self._right_bits = np.uint64(bits // 2)
        self._left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._right_mask = np.uint64((1 << (bits // 2)) - 1)

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices, both (count,) int64, of the samples from `position` on."""
        epochs, places = np.divmod(np.arange(position, position + count), self.num_samples)
        keys = hashed(self.seed, epochs)
        indices = self._shuffle(places.astype(np.uint64), keys)
        outside = np.flatnonzero(indices >= self.num_samples)
        while len(outside):
            indices[outside] = self._shuffle(indices[outside], keys[outside])
            outside = outside[indices[outside] >= self.num_samples]
        return epochs, indices.astype(np.int64)

    def _shuffle(self, words: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A permutation of the power of two, a different one for each key."""
        left, right = words >> self._right_bits, words & self._right_mask
        for number in range(ROUNDS):
            salt = np.uint64(number << 56)  # above any bit of either half
            if number % 2:
                left = left ^ (mix(keys ^ right ^ salt) & self._left_mask)
            else:
                right = right ^ (mix(keys ^ left ^ salt) & self._right_mask)
        return left << self._right_bits | right


def batch_positions(
    position: int, *, rank: int, world_size: int, batch: int, accum_steps: int = 1
) -> Iterator[int]:
    """The start of each micro-batch of one rank in the stream, step after step, without end."""
    per_rank = batch * accum_steps
    while True:
        yield from range(position + rank * per_rank, position + (rank + 1) * per_rank, batch)
        position += world_size * per_rank


def validation_slice(num_samples: int, rank: int, world_size: int) -> range:
    """This rank's share of the validation set: contiguous and disjoint; sizes differ by at most one."""
    return range(num_samples * rank // world_size, num_samples * (rank + 1) // world_size)
