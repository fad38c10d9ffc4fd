"""Train AlexNet-OWT on ImageNet with Horovod and DALI."""

__version__ = "0.1.0"
