"""FLOPs, parameters and activations of every layer, forward and backward, in closed form.

Convolutions are counted as direct ones, a multiply-add as two operations. Fast algorithms (FFT, Winograd)
need fewer, so a device's rate in these units may exceed its peak. Tests compare with counts by torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from horovod_owt.perf.network import CONVOLUTIONS, FC6_IN, HIDDEN

POOL, POOL_STRIDE = 3, 2
POOL_INDEX_BYTES = 8  # torch stores the index of each maximum as an int64
FEATURE_SIDE = 6  # px; the adaptive pool enlarges smaller feature maps to this

# stride, padding, whether a pool follows: of each convolution
GEOMETRY = ((4, 2, True), (1, 2, True), (1, 1, False), (1, 1, False), (1, 1, True))


@dataclass(frozen=True)
class Layer:
    """A convolution or fully connected layer, with its normalisation and pooling; numbers are per image."""

    name: str
    kind: str  # conv or fc
    macs: int  # multiply-adds of a forward pass
    input_gradient: bool  # whether the layer before needs one
    parameters: int
    inputs: int
    outputs: int  # before the pool
    passed_on: int  # after the pool, to the next layer
    normed: bool = False

    @property
    def pooled(self) -> bool:
        return self.passed_on != self.outputs

    @property
    def forward_flops(self) -> int:
        return 2 * self.macs

    @property
    def backward_flops(self) -> int:
        """FLOPs of the weight gradient and, where it is needed, of the input gradient."""
        return 2 * self.macs * (1 + self.input_gradient)

    def kept_bytes(self, pass_bytes: int = 4) -> int:
        """Bytes of activations stored for the backward pass. ReLU works in place."""
        normed = self.outputs if self.normed else 0
        pool = self.passed_on * (pass_bytes + POOL_INDEX_BYTES) if self.pooled else 0
        return (self.outputs + normed) * pass_bytes + pool


@dataclass(frozen=True)
class Net:
    """A network of the AlexNet family: five convolutions, three fully connected layers."""

    name: str
    convolutions: tuple[tuple[int, int, int], ...] = CONVOLUTIONS  # channels in, channels out, kernel
    first_padding: int = GEOMETRY[0][1]
    image_size: int = 224  # px
    classes: int = 1000
    batch_norm: bool = False

    def layers(self) -> list[Layer]:
        """In forward order."""
        layers, side, passed_on = [], self.image_size, 3 * self.image_size**2
        for number, (c_in, c_out, kernel) in enumerate(self.convolutions):
            stride, padding, pool = GEOMETRY[number]
            padding = padding if number else self.first_padding
            side = (side + 2 * padding - kernel) // stride + 1
            inputs, outputs, weights = passed_on, c_out * side**2, c_in * c_out * kernel**2
            macs = weights * side**2
            if pool:
                side = (side - POOL) // POOL_STRIDE + 1
            passed_on = c_out * side**2
            parameters = weights + c_out * (3 if self.batch_norm else 1)
            layers.append(
                Layer(
                    f"conv{number + 1}",
                    "conv",
                    macs,
                    number > 0,
                    parameters,
                    inputs,
                    outputs,
                    passed_on,
                    self.batch_norm,
                )
            )
        sizes = (FC6_IN, HIDDEN, HIDDEN, self.classes)
        for number, (units_in, units) in enumerate(zip(sizes, sizes[1:], strict=False)):
            normed = self.batch_norm and number < 2
            parameters = units_in * units + units * (3 if normed else 1)
            layers.append(
                Layer(
                    f"fc{number + 6}",
                    "fc",
                    units_in * units,
                    True,
                    parameters,
                    units_in,
                    units,
                    units,
                    normed,
                )
            )
        return layers

    def parameters(self, kind: str | None = None) -> int:
        return sum(layer.parameters for layer in self._of(kind))

    def flops(self, kind: str | None = None) -> int:
        """Of a training step for one image: forward and backward."""
        return sum(layer.forward_flops + layer.backward_flops for layer in self._of(kind))

    def kept_bytes(self, pass_bytes: int = 4) -> int:
        """Bytes per image stored on the device for the backward pass, including the image."""
        layers = self.layers()
        return layers[0].inputs * pass_bytes + sum(layer.kept_bytes(pass_bytes) for layer in layers)

    def _of(self, kind: str | None) -> list[Layer]:
        return [layer for layer in self.layers() if kind in (None, layer.kind)]


# The network of TensorFlow's benchmark (tf_cnn_benchmarks, alexnet_model.py): wider conv4, 227 px without
# padding
TF_ALEXNET = Net(
    "tf-alexnet",
    convolutions=((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 384, 3), (384, 256, 3)),
    first_padding=0,
    image_size=227,
    classes=1001,
)


def net_of(model: str, *, classes: int = 1000, image_size: int = 224) -> Net:
    """The network of a configuration."""
    return Net(model, classes=classes, image_size=image_size, batch_norm=model == "alexnet-owt-bn")


NETS = {net.name: net for net in (net_of("alexnet-owt"), net_of("alexnet-owt-bn"), TF_ALEXNET)}
