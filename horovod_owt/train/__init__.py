"""The run: its steps, its folder, its checkpoints."""
