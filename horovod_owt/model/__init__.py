"""AlexNet-OWT and its dropout."""

from horovod_owt.model.alexnet_owt import AlexNetOWT, build_model

__all__ = ["AlexNetOWT", "build_model"]
