"""Horovod's NCCL code on pretended GPUs gives the right numbers."""

import sys

import pytest
from conftest import PROGRAMS


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_and_process_sets(run, on_gpus, ranks):
    seen = run([sys.executable, PROGRAMS / "collectives.py"], ranks=ranks, **on_gpus).json()
    assert seen["ranks"] == ranks and seen["nccl"] >= 20000
