"""Sphinx: `make docs`."""

from horovod_owt import __version__

project = "horovod_owt"
author = "the horovod_owt founders"
release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
exclude_patterns = ["_build"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository
