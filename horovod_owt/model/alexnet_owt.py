"""AlexNet of "One weird trick" (Krizhevsky 2014, arXiv:1404.5997), with or without batch normalisation.

Without it, names and shapes are those of torchvision's `alexnet`. With it, the model is `alexnetowtbn` of
imagenet-multiGPU.torch, with a normalisation after each convolution and each hidden FC layer.
Shapes in the comments are channels x height x width for a 224 px image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = (64, 192, 384, 256, 256)  # outputs of the convolutions
FEATURE_CHANNELS = CHANNELS[-1]
FEATURE_SIDE = 6  # px; the adaptive pooling resizes other feature maps to this
FC6_IN = FEATURE_CHANNELS * FEATURE_SIDE * FEATURE_SIDE  # 9216
HIDDEN = 4096
BN_EPS = 1e-3  # as in imagenet-multiGPU.torch


class AlexNetOWT(nn.Module):
    """Five convolutions, three fully connected layers: (b, 3, side, side) -> (b, classes), side >= 63 px."""

    def __init__(self, classes: int = 1000, *, dropout: float = 0.5, batch_norm: bool = False) -> None:
        super().__init__()

        def conv(channels_in: int, channels: int, kernel: int, stride=1, padding=0, pool=False):
            layers: list[nn.Module] = [nn.Conv2d(channels_in, channels, kernel, stride, padding)]
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels, eps=BN_EPS))
            # Pooling before ReLU gives the same values, because ReLU is monotonic, at a quarter of the cost.
            return [*layers, *([nn.MaxPool2d(kernel_size=3, stride=2)] * pool), nn.ReLU(inplace=True)]

        def hidden(units_in: int, units: int):
            layers: list[nn.Module] = [nn.Dropout(dropout), nn.Linear(units_in, units)]
            if batch_norm:
                layers.append(nn.BatchNorm1d(units, eps=BN_EPS))
            return [*layers, nn.ReLU(inplace=True)]

        c1, c2, c3, c4, c5 = CHANNELS
        self.features = nn.Sequential(
            *conv(3, c1, kernel=11, stride=4, padding=2, pool=True),  # 64 x 55 x 55 -> 64 x 27 x 27
            *conv(c1, c2, kernel=5, padding=2, pool=True),  # 192 x 27 x 27 -> 192 x 13 x 13
            *conv(c2, c3, kernel=3, padding=1),  # 384 x 13 x 13
            *conv(c3, c4, kernel=3, padding=1),  # 256 x 13 x 13
            *conv(c4, c5, kernel=3, padding=1, pool=True),  # 256 x 13 x 13 -> 256 x 6 x 6
        )
        self.avgpool = nn.AdaptiveAvgPool2d((FEATURE_SIDE, FEATURE_SIDE))
        self.classifier = nn.Sequential(
            *hidden(FC6_IN, HIDDEN),  #  37.8 M weights: 62 % of the model
            *hidden(HIDDEN, HIDDEN),  #  16.8 M
            nn.Linear(HIDDEN, classes),  # 4.1 M for 1000 classes
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.convolve(images))

    def convolve(self, images: Tensor) -> Tensor:
        """The features, input of the fully connected layers: (b, 3, side, side) -> (b, 9216)."""
        x = self.features(images)
        if x.shape[-2:] != (FEATURE_SIDE, FEATURE_SIDE):  # not needed at 224 px
            x = self.avgpool(x)
        return torch.flatten(x, 1)


def build_model(name: str, classes: int, *, dropout: float = 0.5, seed: int = 0) -> AlexNetOWT:
    """The model `alexnet-owt` or `alexnet-owt-bn`; its initial weights depend only on `seed`.

    Their distribution is torch's default, uniform with variance 1 / (3 fan_in), with which torchvision and
    imagenet-multiGPU.torch reached their published errors.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AlexNetOWT(classes, dropout=dropout, batch_norm=name == "alexnet-owt-bn")
