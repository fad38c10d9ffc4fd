"""The layers of the design: what is light stays light, and only `parallel` talks to Horovod."""

import gc
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import horovod_owt
from horovod_owt.commands.loading import loading

PACKAGE = Path(horovod_owt.__file__).parent
HEAVY = {"torch", "torchvision", "horovod", "nvidia", "mpi4py"}
LIGHT = ["cli", "commands.data", "config", "errors", "schedule", "topology", "train.prepare"]
LIGHT += [f"data.{name}" for name in ("store", "folder", "listing", "order", "augment", "hashing", "jpeg")]
LIGHT += [f"data.{name}" for name in ("synthetic", "feed", "shards", "pack", "prepare", "build")]
LIGHT += [f"data.{name}" for name in ("faults", "remarks", "verify", "stats")]
LIGHT += [f"parallel.{name}" for name in ("rendezvous", "meeting", "device", "cores", "gpus")]
LIGHT += [
    f"preflight.{name}"
    for name in ("run", "inquiry", "findings", "host", "device", "network", "wire", "dataset")
]
LIGHT += ["commands.preflight", "commands.devices", "versions"]
LIGHT += [f"perf.{name}" for name in ("network", "traffic", "predict")]
LIGHT += ["commands.job", "parallel.interfaces"]
LIGHT += [
    f"{path.parent.name}.{path.stem}"
    for path in PACKAGE.glob("[a-z]*/[a-z]*.py")
    if path.parent.name in ("launch", "slurm")
]


def imported_after(code: str) -> set[str]:
    program = f"{code}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module):
    assert not HEAVY & imported_after(f"import horovod_owt.{module}")


def test_help_loads_nothing_heavy_and_answers_in_half_a_second():
    code = "from horovod_owt.cli import cli; cli(['train', '--help'], standalone_mode=False)"
    assert not HEAVY & imported_after(code)

    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "horovod_owt", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5  # the best of five: the machine may be busy


def test_garbage_is_left_alone_while_modules_load_and_looked_for_again():
    gc.unfreeze()
    with pytest.raises(ImportError), loading():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()


def imports_of(folder: str) -> dict[Path, set[str]]:
    """Module names that each file of a sub-package imports, anywhere in it."""
    pattern = re.compile(r"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)
    return {path: set(pattern.findall(path.read_text())) for path in (PACKAGE / folder).rglob("*.py")}


@pytest.mark.parametrize("folder", ["parallel", "model", "data"])
def test_lower_layers_know_nothing_of_training(folder):
    for path, names in imports_of(folder).items():
        assert not [n for n in names if n.startswith(("horovod_owt.train", "horovod_owt.bench"))], path


def test_only_parallel_talks_to_horovod():
    talks = {path.relative_to(PACKAGE).as_posix(): {n for n in names if re.match(r"horovod(\.|$)", n)}
             for path, names in imports_of(".").items()}  # fmt: skip
    above = {path: names for path, names in talks.items() if names and not path.startswith("parallel/")}
    assert above.keys() < {path for path, names in talks.items() if names}  # the pattern finds something
    # the peer of the benchmark is a Horovod loop as others write it
    assert above.pop("bench/plain_loop.py") == {"horovod.torch"}
    # what starts ranks is not what they do: Horovod's launcher may be called, and loads nothing heavy
    assert above.keys() == {"slurm/launchers.py", "launch/horovodrun.py"}
    runner = set().union(*above.values())
    assert all(re.match(r"horovod\.runner(\.|$)", name) for name in runner)
    launcher = "; ".join(f"import {name}" for name in sorted(runner))
    assert HEAVY & imported_after(launcher) == {"horovod"}
