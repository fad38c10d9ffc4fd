"""A training run: checks before it, the loop, validation, checkpoints."""
