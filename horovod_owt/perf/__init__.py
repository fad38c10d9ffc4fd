"""The arithmetic of a training step: bytes and seconds from sizes alone. Loads no torch."""
