"""Dropout as a function of seed, sample, layer and unit: its draws behave like draws."""

import ctypes
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from horovod_owt.model import dropout as module
from horovod_owt.model.dropout import FUSED_SOURCE, keep_scale, sample_keys

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


FUSED_AS_C = (
    FUSED_SOURCE
    + """
extern "C" int element(int unit, int low, int high, int threshold, int scale_bits) {
    return keep_scale<int>(unit, low, high, threshold, scale_bits);
}
"""
)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.77])
def test_the_gpus_kernel_draws_what_torchs_operations_draw(tmp_path, dropout):
    """Its source is CUDA C++ without anything of a GPU: a C++ compiler makes a function of it."""
    (tmp_path / "kernel.cpp").write_text(FUSED_AS_C)
    library = tmp_path / "kernel.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, tmp_path / "kernel.cpp"], check=True)
    element = ctypes.CDLL(str(library)).element
    keys, units = keys_of(range(5)), module._unit_words(1, range(100, 140), torch.device("cpu"))
    scale_bits = struct.unpack("i", struct.pack("f", 1 / (1 - dropout)))[0]
    bits = [
        [element(unit, low, high, module._threshold(dropout), scale_bits) for unit in units[0].tolist()]
        for low, high in keys.tolist()
    ]
    drawn = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert torch.equal(drawn, keep_scale(keys, 1, range(100, 140), dropout))


def test_the_gpus_kernel_is_in_the_form_that_torch_compiles():
    parsed = torch.cuda.jiterator._CodeParser(FUSED_SOURCE)
    assert (parsed.function_name, parsed.return_type) == ("keep_scale", "T")


def test_cudas_compiler_takes_the_kernel():
    """NVRTC, which torch brings along, needs no GPU."""
    found = sorted(Path(torch.__file__).parent.parent.glob("nvidia/*/lib/libnvrtc.so.*"))
    if not found:
        pytest.skip("this torch has no CUDA")
    nvrtc = ctypes.CDLL(str(found[0]))
    source = FUSED_SOURCE + "template int keep_scale<int>(int, int, int, int, int);"
    source = re.sub("^template <typename T> T", "template <typename T> __device__ T", source.strip())
    source = source.replace("template int keep_scale", "template __device__ int keep_scale")
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"k.cu", 0, None, None) == 0
    assert nvrtc.nvrtcCompileProgram(program, 0, None) == 0


def test_a_gpu_whose_kernel_differs_takes_torchs_operations(monkeypatch, caplog):
    """On the CPU here, and with a compiler that returns ones."""
    ones = lambda source, **_: lambda units, low, high, **_: torch.ones_like(units ^ low)  # noqa: E731
    monkeypatch.setattr(torch.cuda.jiterator, "_create_jit_fn", ones)
    module.fused_kernel.cache_clear()
    assert module.fused_kernel(torch.device("cpu")) is None
    assert "other values than torch's operations" in caplog.text
    module.fused_kernel.cache_clear()
