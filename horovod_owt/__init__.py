"""AlexNet-OWT on ImageNet: Horovod keeps the replicas in step, DALI feeds them."""

__version__ = "0.1.0"
