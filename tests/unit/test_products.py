"""The products of the fully connected layers against torch's own, with oneDNN and without."""

import pytest
import torch

from horovod_owt.parallel import products

SHAPES = [(1, 7, 5), (3, 512, 1), (8, 9216, 300), (33, 100, 1000)]  # rows, units in, units out
INSTRUCTIONS = ["as here", "AVX2", "AVX512", ""]


@pytest.fixture(params=INSTRUCTIONS)
def cpu(request, monkeypatch):
    if request.param.startswith("AVX") and not products._cpu():
        pytest.skip("this torch does not call oneDNN")
    if request.param != "as here":
        monkeypatch.setattr(products, "_cpu", lambda: request.param)


@pytest.fixture(params=SHAPES, ids=str)
def operands(request):
    """x, weight and d_out, of layouts that training has."""
    rows, units_in, units_out = request.param
    generator = torch.Generator().manual_seed(0)
    x, weight, d_out = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, units_in), (units_out, units_in), (units_out, rows))
    )
    return x, weight, d_out.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_those_of_torch(cpu, operands, dtype):
    x, weight, d_out = (each.to(dtype) for each in operands)
    wide = [each.double() for each in (x, weight, d_out)]
    close = dict(rtol=0, atol={torch.float32: 3e-3, torch.float64: 1e-10, torch.bfloat16: 3}[dtype])
    torch.testing.assert_close(products.times_weight(x, weight).double(), wide[0] @ wide[1].t(), **close)
    torch.testing.assert_close(products.times_weight_back(d_out, weight).double(), wide[2] @ wide[1], **close)
    gradient = torch.full_like(weight, float("nan"))
    products.weight_gradient(d_out, x, gradient)
    torch.testing.assert_close(gradient.double(), wide[2].t() @ wide[0], **close)
    products.weight_gradient(d_out, x, gradient, add=True)
    torch.testing.assert_close(gradient.double(), 2 * wide[2].t() @ wide[0], **close)


@pytest.fixture
def asked_again():
    """The processor is looked at again, in the test and after it."""
    products._cpu.cache_clear()
    yield
    products._cpu.cache_clear()


def test_without_onednn_products_are_torchs_own(asked_again, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products._cpu() == "" and not products._by_onednn(torch.ones(2, 2))


@pytest.mark.skipif(not hasattr(torch.backends, "cpu"), reason="torch 2.0 does not name instructions")
def test_on_another_processor_products_are_torchs_own(asked_again, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not products._by_onednn(torch.ones(2, 2))


def test_a_gradient_is_computed_in_parts_that_fit_a_cache(monkeypatch):
    if not products._cpu():
        pytest.skip("this torch does not call oneDNN")
    monkeypatch.setattr(products, "_cpu", lambda: "AVX2")
    sizes = []
    whole = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda a, b: sizes.append(4 * len(a) * len(b)) or whole(a, b))
    products.weight_gradient(torch.ones(2, 2000), torch.ones(2, 4096), torch.empty(2000, 4096))
    assert len(sizes) == 4 and max(sizes) <= products.CHUNK_BYTES and sum(sizes) == 4 * 2000 * 4096
