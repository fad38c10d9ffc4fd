"""Sphinx: `make docs`. References are made from the code at each build: reference.py beside this file."""

import sys
from pathlib import Path

from horovod_owt import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "horovod_owt"
author = "the horovod_owt founders"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "reference"]
myst_heading_anchors = 3
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_mock_imports = ["horovod", "mpi4py", "nvidia", "pynvml"]  # nothing is run, so no rank is needed
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # not those of torch
autodoc_typehints_format = "short"
