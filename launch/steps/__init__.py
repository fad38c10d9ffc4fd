"""The steps of launch/setup. Standard library only: they run before there is a virtual environment."""
