"""Real ranks with the CUDA lane's Horovod on pretended GPUs: `make rehearse-gpu`, not `make test`."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import real_ranks as ranks
from real_ranks import images, run, start

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
if "OWT_REHEARSE_GPU" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("pretended_build", HERE / "build.py")
__all__ = ["images", "run", "start"]


@pytest.fixture(scope="session")
def on_gpus() -> dict[str, str]:
    """An environment in which a process sees pretended GPUs and loads the CUDA lane's Horovod."""
    place = build.Place(Path(sys.prefix))
    found = build.find_tools(place)
    stand_ins, horovod = build.build_stand_ins(place, found), build.build_horovod(place, found)
    return {
        "LD_PRELOAD": f"{stand_ins}/libpretended_gpu.so:{stand_ins}/libpretended_nccl.so",
        "LD_LIBRARY_PATH": str(stand_ins),
        "PYTHONPATH": os.pathsep.join(map(str, [horovod, HERE, ranks.PROGRAMS])),
        "PRETENDED_GPUS": "4",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",  # the ranks of tests/parallel see none
        "HOROVOD_FUSION_THRESHOLD": "0",  # the fusion buffer is filled by a kernel
    }


@pytest.fixture
def owt_on_gpus(on_gpus, tmp_path) -> dict[str, str]:
    """The same, and its `owt` computes there, with the narrow net."""
    owt = tmp_path / "bin" / "owt"
    owt.parent.mkdir()
    real = ranks.VENV_BIN / "owt"
    program = PROGRAMS / "owt_on_gpus.py"
    owt.write_text(
        f'#!/bin/sh\ncase $1 in launch) exec {real} "$@" ;; esac\nexec {sys.executable} {program} "$@"\n'
    )
    owt.chmod(0o755)
    return {**on_gpus, "PATH": f"{owt.parent}{os.pathsep}{ranks.VENV_BIN}{os.pathsep}{os.environ['PATH']}"}
