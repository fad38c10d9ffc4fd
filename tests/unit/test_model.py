"""The network against torchvision's, and its sizes against the paper's."""

import pytest
import torch
import torchvision

from horovod_owt.model import build_model
from horovod_owt.schedule import IMAGE_SIZES

SMALLEST = IMAGE_SIZES[0]


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(3)
    return torchvision.models.alexnet(weights=None).eval()


def test_our_weights_load_into_torchvision_and_back(theirs):
    ours, images = build_model("alexnet-owt", 1000, seed=5).eval(), torch.randn(2, 3, 224, 224)
    start = ours(images)
    assert not torch.equal(start, theirs(images))

    theirs_too = torchvision.models.alexnet(weights=None).eval()
    theirs_too.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs_too(images), start)

    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs(images))


def test_parameters_are_the_papers():
    model = build_model("alexnet-owt", 1000)
    assert sum(p.numel() for p in model.features.parameters()) == 2_469_696
    assert sum(p.numel() for p in model.classifier.parameters()) == 58_631_144


def test_batch_norm_follows_each_conv_and_each_hidden_layer():
    def after(stage, weights):
        return [type(follower).__name__ for layer, follower in zip(stage, stage[1:], strict=False)
                if isinstance(layer, weights)]  # fmt: skip

    model = build_model("alexnet-owt-bn", 1000)
    assert after(model.features, torch.nn.Conv2d) == ["BatchNorm2d"] * 5
    assert after(model.classifier, torch.nn.Linear) == ["BatchNorm1d"] * 2


@pytest.mark.parametrize("name", ["alexnet-owt", "alexnet-owt-bn"])
@pytest.mark.parametrize("side", [SMALLEST, 64, 97, 256])
def test_any_side_and_any_number_of_classes(name, side):
    model = build_model(name, classes=7)
    assert model(torch.randn(2, 3, side, side)).shape == (2, 7)


def test_one_pixel_less_than_the_smallest_side_is_too_small():
    with pytest.raises(RuntimeError):
        build_model("alexnet-owt", classes=2)(torch.randn(1, 3, SMALLEST - 1, SMALLEST - 1))


def test_initial_weights_follow_the_seed_alone():
    torch.manual_seed(1)
    one = build_model("alexnet-owt", 10, seed=4).state_dict()
    torch.manual_seed(2)
    same, other = build_model("alexnet-owt", 10, seed=4).state_dict(), build_model("alexnet-owt", 10, seed=5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.1.weight"], other.state_dict()["classifier.1.weight"])
