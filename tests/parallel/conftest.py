"""Fixtures of the tests with real ranks."""

from real_ranks import chance, images, narrow_net, narrow_owt, run, start

__all__ = ["chance", "images", "narrow_net", "narrow_owt", "run", "start"]
