"""FLOPs, parameters and activations of each layer, against counts by torch's hooks."""

import pytest
import torch

from horovod_owt.model.alexnet_owt import AlexNetOWT
from horovod_owt.perf.layers import TF_ALEXNET, Net, net_of

FlopCounterMode = pytest.importorskip("torch.utils.flop_counter", reason="torch 2.1 counts").FlopCounterMode
IMAGES = 2


def weighted(model) -> dict[str, torch.nn.Module]:
    """Our names of the convolutions and linear layers."""
    modules = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    names = [f"conv{n}" for n in range(1, 6)] + ["fc6", "fc7", "fc8"]
    return dict(zip(names, modules, strict=True))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("image_size", "classes"), [(224, 1000), (128, 10)])
def test_flops_of_every_layer_are_those_that_torch_counts(image_size, classes, batch_norm):
    net = net_of(
        "alexnet-owt-bn" if batch_norm else "alexnet-owt", classes=classes, image_size=image_size
    )  # fmt: skip
    with torch.device("meta"):
        model = AlexNetOWT(classes, batch_norm=batch_norm, dropout=0.0)
        images = torch.empty(IMAGES, 3, image_size, image_size)
    forward, whole = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        loss = model(images).sum()
    with whole:
        model(images).sum().backward()
    assert forward.get_total_flops() == IMAGES * sum(layer.forward_flops for layer in net.layers())
    assert whole.get_total_flops() == IMAGES * net.flops()
    counted = {kind: 0 for kind in ("conv", "fc")}
    for operator, flops in whole.get_flop_counts()["Global"].items():
        counted["conv" if "convolution" in str(operator) else "fc"] += flops
    assert counted == {kind: IMAGES * net.flops(kind) for kind in counted}
    assert loss.shape == ()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_sizes_of_every_layer_are_those_that_hooks_see(batch_norm):
    net = net_of("alexnet-owt-bn" if batch_norm else "alexnet-owt")
    with torch.device("meta"):
        model, images = AlexNetOWT(batch_norm=batch_norm), torch.empty(IMAGES, 3, 224, 224)
    seen = {}

    def hook(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0].numel(), output.numel())})

    for name, module in weighted(model).items():
        module.register_forward_hook(hook(name))
    model(images)
    assert seen == {layer.name: (IMAGES * layer.inputs, IMAGES * layer.outputs) for layer in net.layers()}
    assert net.parameters() == sum(p.numel() for p in model.parameters())
    conv_parameters = sum(p.numel() for p in model.features.parameters())
    assert net.parameters("conv") == conv_parameters


@pytest.mark.parametrize("batch_norm", [False, True])
def test_activations_kept_by_convolutions_are_those_that_autograd_saves(batch_norm):
    net = net_of("alexnet-owt-bn" if batch_norm else "alexnet-owt")
    model = AlexNetOWT(10, batch_norm=batch_norm).features
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(IMAGES, 3, 224, 224))
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved = sum(
        t.untyped_storage().nbytes()
        for key, t in kept.items()
        if key not in own and t.dim() == 4  # a norm's statistics are a few kB
    )
    layers = [layer for layer in net.layers() if layer.kind == "conv"]
    expected = IMAGES * (layers[0].inputs * 4 + sum(layer.kept_bytes() for layer in layers))
    assert saved == expected
    assert out.shape == (IMAGES, 256, 6, 6)


def test_known_totals():
    owt = net_of("alexnet-owt")
    assert owt.parameters() == 61_100_840 and owt.parameters("conv") == 2_469_696
    assert sum(layer.macs for layer in owt.layers()) == 655_566_528 + 58_621_952
    assert owt.flops() == 4_144_577_280  # 4.14 GFLOP
    assert sum(layer.macs for layer in TF_ALEXNET.layers() if layer.kind == "conv") == 780_166_848
    assert isinstance(TF_ALEXNET, Net) and TF_ALEXNET.layers()[4].passed_on == 9216
