"""AlexNet-OWT, and a dropout that does not depend on the number of ranks."""

from horovod_owt.model.alexnet_owt import AlexNetOWT, build_model

__all__ = ["AlexNetOWT", "build_model"]
