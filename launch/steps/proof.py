"""Test an installation: an allreduce of two ranks under each launcher that this Horovod supports."""

import json
import os
import re
from collections.abc import Sequence

from steps.mpi import Mpi
from steps.place import LAUNCH, Place
from steps.process import Failed, run

RANKS = 2
LIMIT_S = 120  # importing torch takes a rank some seconds


def launchers(mpi: Mpi) -> dict[str, list[str]]:
    """The launchers that must work here, by name of launcher and controller."""
    horovodrun = ["horovodrun", "--disable-cache"]  # of ~/.horovod, where the home may be read-only
    ways = {"horovodrun --gloo": [*horovodrun, "--gloo", "-np", str(RANKS)]}
    if mpi.there:
        ways["horovodrun --mpi"] = [*horovodrun, "--mpi", "-np", str(RANKS)]
        # two slots, whatever the number of cores
        here = ["--host", f"localhost:{RANKS}"] if mpi.is_open_mpi else []
        ways["mpirun"] = ["mpirun", "-np", str(RANKS), *here]
    return ways


def prove(place: Place, mpi: Mpi) -> dict[str, dict]:
    """Run the allreduce under each launcher; returns rank 0's report by launcher."""
    env = {**place.child_env(), "OMP_NUM_THREADS": "1"}
    if os.getuid() == 0:  # for this test only; for root and mpirun see docs/setup.md
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    proofs = {}
    for name, words in launchers(mpi).items():
        proofs[name] = prove_one(place, name, words, env, mpi)
    if proofs["horovodrun --gloo"]["nccl_built"] and proofs["horovodrun --gloo"]["gpus"] >= RANKS:
        words = launchers(mpi)["horovodrun --gloo"]
        proofs["NCCL"] = prove_one(place, "NCCL", words, env, mpi, "--gpu")
    return proofs


def prove_one(
    place: Place, name: str, launcher: Sequence[str], env: dict[str, str], mpi: Mpi, *options: str
) -> dict:
    log = place.log(f"proof-{re.sub(r'[^a-z]+', '-', name.lower())}")
    argv = [place.bin / launcher[0] if (place.bin / launcher[0]).exists() else launcher[0], *launcher[1:]]
    text = run(
        f"{RANKS} ranks under {name}",
        [*argv, place.python, LAUNCH / "proof" / "allreduce.py", *options],
        log=log,
        env=env,
        cwd=place.cache,
        timeout_s=LIMIT_S,
    )
    ranks = [json.loads(found) for found in re.findall(r"PROOF (\{.*?\}) END", text)]
    if fault := fault_in(ranks, "gloo" if "--gloo" in launcher else "mpi", place, mpi):
        raise Failed(f"{RANKS} ranks under {name}: {fault}; log: {log}")
    return ranks[0]


def fault_in(ranks: list[dict], controller: str, place: Place, mpi: Mpi) -> str | None:
    """The fault in the ranks' reports, if any."""
    if sorted(rank["rank"] for rank in ranks) != list(range(RANKS)):
        return f"ranks {[rank['rank'] for rank in ranks]} reported, wanted 0 to {RANKS - 1}"
    for rank in ranks:
        if rank["size"] != RANKS or not rank["sum_is_right"]:
            return f"rank {rank['rank']} of {rank['size']}: wrong sum over the ranks"
        if rank["controller"] != controller:
            return f"rank {rank['rank']} ran under {rank['controller']}, wanted {controller}"
        if rank["mpi4py_size"] not in (None, RANKS):
            return f"mpi4py sees {rank['mpi4py_size']} rank(s), wanted {RANKS}: it is built for another MPI"
        if len(rank["libmpi"]) > 1:
            return f"two MPI libraries in one process: {', '.join(rank['libmpi'])}"
        if mpi.source == "pip" and any(
            not path.startswith(os.path.realpath(place.venv)) for path in rank["libmpi"]
        ):
            return f"Horovod loaded {rank['libmpi'][0]}, wanted the one in {place.venv}"
    return None
