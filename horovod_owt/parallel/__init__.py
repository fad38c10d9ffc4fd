"""Ranks, devices and collectives on Horovod, and the training step that uses them."""
