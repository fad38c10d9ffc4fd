"""Compressed sums in a simulated world of several ranks in this process, held against plain programs."""

from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.parallel import compression
from horovod_owt.parallel.compression import CompressionState, build_compressors
from horovod_owt.parallel.groups import Group
from horovod_owt.parallel.low_rank import LowRank
from horovod_owt.parallel.one_bit import (
    MAX_BLOCK,
    OneBit,
    dequantise,
    pack,
    pack_on_gpu,
    quantise_,
    unpack,
    unpack_on_gpu,
)

STEPS = 5
SHAPE = (7, 21)  # not a multiple of the ranks, nor of a byte's bits


class SimulatedExchange:
    """The transfers of an Exchange, between threads of this process."""

    def __init__(self, group: Group, posted: dict, arrival: Condition) -> None:
        self.group, self._posted, self._arrival = group, posted, arrival

    def _post(self, name: str, value, result) -> SimpleNamespace:
        """Post a value; `wait` returns `result` of those of all ranks, in their order."""
        with self._arrival:
            everyone = self._posted.setdefault(name, {})
            if len(everyone) == self.group.size:  # of an earlier step
                everyone = self._posted[name] = {}
            everyone[self.group.index] = value
            self._arrival.notify_all()

        def wait():
            with self._arrival:
                assert self._arrival.wait_for(lambda: len(everyone) == self.group.size, timeout=20), name
            return result([everyone[index] for index in range(self.group.size)])

        return SimpleNamespace(wait=wait)

    def alltoall_rows(self, rows, sizes, what, name):
        parts = [part.clone() for part in rows.split(sizes)]

        def own(all_parts):
            arrived = torch.cat([parts[self.group.index] for parts in all_parts])
            assert arrived.numel() <= compression.MAX_ELEMENTS, name
            return arrived

        return self._post(name, parts, own)

    def allgather_rows(self, own, what, name=""):
        return self._post(name, own.clone(), torch.cat)

    def allreduce(self, parts, what, name=""):
        return self._post(name, parts.clone(), lambda everyone: torch.stack(everyone).sum(dim=0))

    def broadcast_rows(self, own, owner, what):
        return self._post(what, own.clone(), lambda everyone: everyone[owner])


def exchanges(ranks: int) -> list[SimulatedExchange]:
    posted, arrival = {}, Condition()
    return [
        SimulatedExchange(Group(tuple(range(ranks)), index, None), posted, arrival) for index in range(ranks)
    ]


def on_each(made: list, action) -> list:
    """The result of `action(rank's, rank)`, run by all ranks at the same time."""
    with ThreadPoolExecutor(len(made)) as ranks:
        return list(ranks.map(action, made, range(len(made))))


def world(kind: str, ranks: int, shape=SHAPE):
    """A compressor on each rank, of one matrix."""
    matrix, found = torch.zeros(shape), []
    for exchange in exchanges(ranks):
        if kind == "onebit":
            found.append(OneBit(matrix, exchange, what="fc", name="w"))
        else:
            rank = int(kind.partition(":")[2])
            found.append(LowRank(matrix, exchange, rank=rank, what="fc", name="w", seed=3))
    return found


def gradients(ranks: int, shape=SHAPE, seed: int = 0) -> list[list[torch.Tensor]]:
    """Of each step and rank: with a common part, as those of one net have."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=draw)
    return [[common + torch.randn(shape, generator=draw) for _ in range(ranks)] for _ in range(STEPS)]


def sums(compressors, steps) -> list[torch.Tensor]:
    """The result of each step, which is the same on each rank."""

    def train(compressor, rank):
        found = [step[rank].clone() for step in steps]
        for total in found:
            compressor.start(total)
            compressor.advance()
            compressor.finish(total)
        return found

    first, *others = on_each(compressors, train)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return first


def left_over(compressors) -> torch.Tensor:
    """The errors of all ranks, added up."""
    total = sum(compressor.error for compressor in compressors)
    owners = [c.owner_error for c in compressors if isinstance(c, OneBit)]
    return total + torch.cat(owners) if owners else total


def nothing_is_lost(compressors, steps) -> bool:
    """Whether what was sent and the final errors add up to the gradients."""
    sent = sum(sums(compressors, steps)) + left_over(compressors)
    whole = sum(gradient for step in steps for gradient in step)
    return torch.allclose(sent, whole, rtol=1e-5, atol=1e-5)


def quantised_by_hand(values: np.ndarray) -> np.ndarray:
    """Seide et al. 2014 with two means a row, number by number."""
    found = np.zeros_like(values)
    for row, numbers in enumerate(values):
        for side in (numbers >= 0, numbers < 0):
            if side.any():
                found[row, side] = numbers[side].mean()
    return found


def one_bit_by_hand(steps, ranks: int) -> list[np.ndarray]:
    """Sums with error feedback at the workers and at the owner, of whole matrices."""
    errors = [np.zeros(SHAPE) for _ in range(ranks + 1)]  # the last one is the owners'
    found = []
    for step in steps:
        total = errors[ranks]
        for rank, gradient in enumerate(step):
            wanted = gradient.double().numpy() + errors[rank]
            sent = quantised_by_hand(wanted)
            errors[rank] = wanted - sent
            total = total + sent
        found.append(quantised_by_hand(total))
        errors[ranks] = total - found[-1]
    return found


@pytest.mark.parametrize("columns", [1, 8, 21, 64])
def test_bits_are_packed_on_a_gpu_as_on_a_cpu(columns):
    draw = torch.Generator().manual_seed(columns)
    bits = torch.randint(2, (5, columns), generator=draw, dtype=torch.uint8)
    packed = pack(bits)
    assert packed.shape == (5, -(-columns // 8)) and packed[0, 0] % 2 == bits[0, 0]
    assert torch.equal(pack_on_gpu(bits), packed)
    assert torch.equal(unpack(packed, columns), bits) and torch.equal(unpack_on_gpu(packed, columns), bits)


@pytest.mark.parametrize(
    "values", [[[1.0, 2.0, 3.0]], [[-1.0, -2.0, -6.0]], [[0.0, 0.0, 0.0]], [[-1.0, 0.0, 5.0]]]
)
def test_rows_of_one_sign_have_one_mean(values):
    values = torch.tensor(values)
    left = values.clone()
    sent = dequantise(quantise_(left), torch.empty_like(values))
    assert np.allclose(sent.numpy(), quantised_by_hand(values.numpy()))
    assert torch.allclose(sent + left, values)


def test_large_matrices_are_quantised_block_by_block():
    values = torch.randn(3, MAX_BLOCK // 2 + 3, generator=torch.Generator().manual_seed(0))
    left = values.clone()
    sent = dequantise(quantise_(left), torch.empty_like(values))
    assert np.allclose(sent.numpy(), quantised_by_hand(values.numpy()), atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_one_bit_equals_the_plain_program(ranks):
    """With 8 ranks one of them owns none of the 7 rows."""
    steps = gradients(ranks)
    for seen, wanted in zip(sums(world("onebit", ranks), steps), one_bit_by_hand(steps, ranks), strict=True):
        assert np.allclose(seen.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["onebit", "powersgd:1", "powersgd:4"])
def test_what_was_sent_and_the_errors_are_the_gradients(kind, ranks):
    assert nothing_is_lost(world(kind, ranks), gradients(ranks))


def test_an_error_that_is_added_twice_is_seen():
    """As fbcunn's program does: it sends what is in g + 2e, and so the errors grow."""

    class Twice(OneBit):
        def start(self, gradient):
            super().start(gradient + self.error)

    once, twice = (
        world("onebit", 2),
        [Twice(c.error, c._exchange, what="fc", name="w") for c in world("onebit", 2)],
    )
    steps = 4 * gradients(2)
    assert nothing_is_lost(once, steps) and not nothing_is_lost(twice, steps)
    assert left_over(twice).norm() > 100 * left_over(once).norm()


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_a_rank_as_large_as_the_matrix_loses_nothing(shape):
    steps = gradients(3, shape)
    compressors = world("powersgd:5", 3, shape)
    for seen, step in zip(sums(compressors, steps), steps, strict=True):
        assert torch.allclose(seen, sum(step), atol=1e-5)
    assert left_over(compressors).norm() < 1e-4


def test_low_rank_comes_closer_with_each_step_of_one_gradient():
    """The warm start: Q of the step before is a step of subspace iteration."""
    step = gradients(2)[0]
    compressors = world("powersgd:2", 2)
    for compressor in compressors:
        compressor.error.zero_()
    distances = []
    for _ in range(4):
        (seen,) = sums(compressors, [step])
        for compressor in compressors:
            compressor.error.zero_()
        distances.append(float((seen - sum(step)).norm()))
    best = torch.linalg.svdvals(sum(step))[2:].norm()
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1.1 * best


def test_a_gradient_of_zeros_does_not_end_it():
    compressors = world("powersgd:2", 2)
    (nothing,) = sums(compressors, [[torch.zeros(SHAPE)] * 2])
    (after,) = sums(compressors, gradients(2)[:1])
    assert not nothing.any() and after.isfinite().all() and after.norm() > 1


def test_only_matrices_that_get_smaller_are_compressed():
    named = {
        "w": nn.Parameter(torch.zeros(2, 9)),
        "b": nn.Parameter(torch.zeros(9)),
        "v": nn.Parameter(torch.zeros(9, 9)),
    }
    (exchange, _) = exchanges(2)

    def compressed(kind: str) -> set[str]:
        return build_compressors(kind, named, exchange, what="fc", seed=0).keys()

    assert compressed("onebit") == {"w", "v"} and compressed("powersgd:4") == {"v"}
    assert compressed("powersgd:5") == compressed("none") == compressed("fp16") == set()


def several(kind: str, ranks: int) -> list[SimpleNamespace]:
    """On each rank compressors of two matrices, and their state."""
    named = {"w": nn.Parameter(torch.zeros(SHAPE)), "v": nn.Parameter(torch.zeros(12, 10))}
    found = []
    for exchange in exchanges(ranks):
        compressors = build_compressors(kind, named, exchange, what="fc", seed=0)
        found.append(SimpleNamespace(state=CompressionState(compressors, exchange), **compressors))
    return found


def train(made: list[SimpleNamespace], seed: int) -> list[torch.Tensor]:
    """The sums of some steps."""
    found = sums([each.w for each in made], gradients(len(made), SHAPE, seed=seed))
    return found + sums([each.v for each in made], gradients(len(made), (12, 10), seed=seed))


def saved_by(made) -> dict[str, torch.Tensor]:
    """What a checkpoint gets."""
    kept, *nothing = on_each(made, lambda each, _: each.state.gather())
    assert not any(nothing) and {k: tuple(t.shape) for k, t in kept.items()} == made[0].state.shapes()
    return {name: tensor.clone() for name, tensor in kept.items()}


def continued(kind: str, ranks: int, kept, way: str) -> list[SimpleNamespace]:
    """A new world that resumes from a checkpoint of rank 0, or from a commit that each rank has."""
    made = several(kind, ranks)
    if way == "commit":
        on_each(made, lambda each, _: each.state.restore_total(kept))
    else:
        on_each(made, lambda each, rank: each.state.restore(kept if rank == 0 else {}))
    return made


@pytest.mark.parametrize("kind", ["onebit", "powersgd:2"])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(kind):
    made = several(kind, 3)
    train(made, seed=1)
    kept = saved_by(made)
    unbroken, resumed = train(made, seed=2), train(continued(kind, 3, kept, "checkpoint"), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(unbroken, resumed, strict=True))
    anew = train(several(kind, 3), seed=2)
    assert not torch.equal(anew[0], unbroken[0])


@pytest.mark.parametrize("kind", ["onebit", "powersgd:2"])
def test_errors_of_many_ranks_travel_in_pieces(kind, monkeypatch):
    made = several(kind, 3)
    train(made, seed=1)
    whole = saved_by(made)
    monkeypatch.setattr(compression, "MAX_ELEMENTS", 150)  # two rows of three ranks
    pieces = saved_by(made)
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)
    resumed = continued(kind, 3, pieces, "checkpoint")
    assert all(torch.equal(a.w.error, b.w.error) for a, b in zip(made, resumed, strict=True))


@pytest.mark.parametrize("way", ["checkpoint", "commit"])
@pytest.mark.parametrize(
    "kinds", [("onebit", "onebit"), ("powersgd:2", "powersgd:2"), ("onebit", "powersgd:2")]
)
@pytest.mark.parametrize("ranks", [(3, 2), (2, 3), (2, 2), (2, 1)])
def test_other_ranks_have_the_same_errors_between_them(kinds, ranks, way):
    made = several(kinds[0], ranks[0])
    train(made, seed=1)
    kept = saved_by(made) if way == "checkpoint" else on_each(made, lambda each, _: each.state.total())[1]
    after = continued(kinds[1], ranks[1], kept, way)
    for name in "wv":
        before, now = (left_over([vars(each)[name] for each in each_world]) for each_world in (made, after))
        assert before.norm() > 1 and torch.allclose(now, before, rtol=1e-5, atol=1e-5)
    if "powersgd:2" in kinds and kinds[0] == kinds[1] and ranks[1] > 1:
        assert all(torch.equal(each.w.query, made[0].w.query) for each in after)


def test_one_rank_sends_nothing_and_takes_the_error_in():
    made = several("onebit", 2)
    train(made, seed=1)
    (alone,) = continued("onebit", 1, saved_by(made), "checkpoint")
    left = left_over([each.w for each in made])
    steps = gradients(1)
    first, second, *_ = sums([alone.w], steps)
    assert torch.allclose(first, steps[0][0] + left, atol=1e-5) and torch.equal(second, steps[1][0])


def test_a_checkpoint_without_errors_begins_with_none():
    after = continued("onebit", 2, {}, "checkpoint")
    assert not left_over([each.w for each in after]).any()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(compression="powersgd:0"), "compression=powersgd:0; wanted a rank from 1 to 4096"),
        (dict(compression="powersgd:x"), "compression=powersgd:x; wanted a rank"),
        (dict(compression="powersgd"), "compression=powersgd; wanted none, fp16, onebit or powersgd:R"),
        (dict(compression="onebit", parallel="hybrid"), "compression=onebit with parallel=hybrid"),
        (dict(compression="powersgd:4", precision="fp16"), "compression=powersgd:4 with precision=fp16"),
        (dict(compression_start=-1), "compression_start=-1; wanted at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(values, said):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
