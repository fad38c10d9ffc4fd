"""Layer sizes of AlexNet-OWT and parameter counts. A test compares them with the model."""

from __future__ import annotations

FC6_IN = 256 * 6 * 6  # channels * height * width after the last pool
HIDDEN = 4096
# input channels, output channels, kernel size
CONVOLUTIONS = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))


def conv_channels() -> int:
    """Output channels of all convolutions, for which batch normalisation keeps statistics."""
    return sum(channels for _, channels, _ in CONVOLUTIONS)


def conv_parameters(*, batch_norm: bool = False) -> int:
    """Weights and biases of the convolutions, and of their batch normalisations."""
    linear = sum(c_out * (c_in * kernel**2 + 1) for c_in, c_out, kernel in CONVOLUTIONS)
    return linear + (2 * conv_channels() if batch_norm else 0)


def share(units: int, parts: int, index: int) -> int:
    """Size of part `index` in an even split of `units`; the first parts get the remainder."""
    return units // parts + (index < units % parts)


def fc_layers(classes: int, *, group_size: int = 1) -> list[tuple[int, int]]:
    """(units in, units out) of the part of fc6, fc7 and fc8 that the first rank of a group holds.

    fc6 is split by output units, fc7 and fc8 by input units; see parallel.split_classifier.
    """
    own = share(HIDDEN, group_size, 0)
    return [(FC6_IN, own), (own, HIDDEN), (own, classes)]


def fc_parameters(classes: int, *, group_size: int = 1, index: int = 0, batch_norm: bool = False) -> int:
    """Weights and biases of the fully connected layers that one rank of a group holds."""
    own, own_classes = share(HIDDEN, group_size, index), share(classes, group_size, index)
    weights = own * (FC6_IN + HIDDEN + classes)
    biases = 2 * own + own_classes
    return weights + biases + (4 * own if batch_norm else 0)
