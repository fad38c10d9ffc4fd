"""The training run: configuration checks, the loop, validation, checkpoints."""
