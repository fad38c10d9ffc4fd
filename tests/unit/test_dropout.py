"""Dropout as a function of seed, sample, layer and unit: its draws behave like draws."""

import numpy as np
import pytest
import torch

from horovod_owt.model.dropout import keep_scale, sample_keys

ROWS, UNITS = 256, 4096


def keys_of(positions, seed: int = 7) -> torch.Tensor:
    return torch.from_numpy(sample_keys(seed, np.asarray(positions)))


def kept(*, rows=range(ROWS), layer: int = 0, dropout: float = 0.5, seed: int = 7) -> torch.Tensor:
    """1 where a unit is kept, 0 where it is not."""
    return (keep_scale(keys_of(rows, seed), layer, range(UNITS), dropout) > 0).float()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_share_that_was_asked_for_is_dropped_and_the_mean_kept(dropout):
    scale = keep_scale(keys_of(range(ROWS)), 0, range(UNITS), dropout)
    assert scale.shape == (ROWS, UNITS) and scale.dtype == torch.float32
    assert scale.unique().tolist() == pytest.approx([0, 1 / (1 - dropout)])
    draws = scale.numel()
    deviation = (dropout * (1 - dropout) / draws) ** 0.5
    assert (scale == 0).double().mean().item() == pytest.approx(dropout, abs=4 * deviation)
    # no sample and no unit is favoured: 4352 of them, each within 5.5 standard deviations
    for dim, count in ((1, UNITS), (0, ROWS)):
        off = (scale == 0).double().mean(dim=dim) - dropout
        assert off.abs().max().item() < 5.5 * (dropout * (1 - dropout) / count) ** 0.5


def test_no_dropout_keeps_all():
    assert (keep_scale(keys_of(range(4)), 0, range(UNITS), 0.0) == 1).all()


def test_samples_draw_independently():
    """32640 pairs of neighbours and others, each within 5.5 standard deviations of no correlation."""
    pairs = torch.corrcoef(kept()) - torch.eye(ROWS)
    assert pairs.abs().max().item() < 5.5 / UNITS**0.5


def test_units_draw_independently():
    """Neighbours, which a worse mixing would tie together, and units that differ in one bit."""
    draws = kept(rows=range(1024))
    pairs = torch.corrcoef(draws[:, :256].t()) - torch.eye(256)
    assert pairs.abs().max().item() < 5.5 / 1024**0.5
    for bit in range(8, 12):
        assert (
            abs(correlation(draws[:, : 1 << bit], draws[:, 1 << bit : 2 << bit])) < 5 / (1024 << bit) ** 0.5
        )


@pytest.mark.parametrize("other", [{"layer": 1}, {"layer": 2}, {"seed": 8}, {"rows": range(ROWS, 2 * ROWS)}])
def test_layers_seeds_and_steps_draw_independently(other):
    assert abs(correlation(kept(), kept(**other))) < 5 / (ROWS * UNITS) ** 0.5


def test_a_part_of_the_units_draws_as_it_does_in_the_whole():
    keys = keys_of(range(16))
    whole = keep_scale(keys, 1, range(UNITS), 0.5)
    for units in (range(0, 1366), range(1366, 2731), range(2731, 4096), range(5, 5)):
        part = keep_scale(keys, 1, units, 0.5)
        assert torch.equal(part, whole[:, units.start : units.stop])


def test_a_sample_draws_the_same_in_whatever_batch_it_comes():
    together = kept(rows=range(100, 116))
    for rows in ([103], [115, 100], range(104, 112)):
        assert torch.equal(kept(rows=rows), together[[row - 100 for row in rows]])


def test_samples_far_along_the_stream_have_keys_of_their_own():
    """90 epochs of ImageNet are 2**27 samples; keys of 32 bits would meet, of 64 they do not."""
    keys = sample_keys(0, np.arange(2**40, 2**40 + 2**18))
    assert keys.shape == (2**18, 2) and keys.dtype == np.int32
    assert len(np.unique(np.ascontiguousarray(keys).view(np.int64))) == 2**18
