"""Ranks on CPU cores that wait in MPI leave their core to those that compute."""

import sys

from real_ranks import PROGRAMS

PROGRAM = [sys.executable, PROGRAMS / "waiting_rank.py"]
SPINNING = {"OMPI_MCA_mpi_yield_when_idle": "0"}


def test_a_rank_that_waits_in_mpi_gives_up_its_core(run):
    cpu = run(PROGRAM, launcher="mpirun").json()
    assert cpu["waiting_s"] < 0.5 * cpu["computing_s"]


def test_a_user_who_wants_ranks_to_spin_gets_that(run):
    """Also the proof that the test above would notice."""
    cpu = run(PROGRAM, launcher="mpirun", **SPINNING).json()
    assert cpu["waiting_s"] > 0.7 * cpu["computing_s"]
