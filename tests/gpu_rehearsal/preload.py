"""Starts the running program again, with the stand-in for the CUDA runtime preloaded. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PRETENDED = "OWT_TEST_PRETENDED_CUDA"


def under_pretended_cuda() -> None:
    """Start this program again, with the stand-in for the CUDA runtime preloaded."""
    if PRETENDED in os.environ:
        return
    with tempfile.TemporaryDirectory(prefix="pretended-cuda-") as folder:
        library = Path(folder, "libcuda.so.1")
        source = Path(__file__).with_name("pretended_cuda.c")
        options = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["cc", *options, "-o", library, source], check=True)
        env = {**os.environ, PRETENDED: "1", "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
