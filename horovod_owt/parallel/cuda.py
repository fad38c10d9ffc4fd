"""Why CUDA does not start in this process."""

from __future__ import annotations

import re

import torch


def cuda_fault() -> str:
    """Why torch cannot start CUDA; empty if it can."""
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # the first: a torch without CUDA
        text = str(error).strip()
        number = re.search(r"Error \d+: .*", text)  # behind advice to programmers
        return number[0] if number else text.partition("\n")[0]
    return ""
