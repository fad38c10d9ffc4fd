"""A performance model of a training step: bytes and seconds in closed form. Needs no torch."""
