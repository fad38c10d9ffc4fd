"""A model of a training step: bytes and seconds computed from sizes alone. Needs no torch."""
