"""Ranks, devices and collectives: the one package that talks to Horovod."""
