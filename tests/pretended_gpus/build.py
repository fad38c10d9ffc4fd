"""Build what pretended GPUs need: the stand-ins, and the CUDA lane's Horovod for this environment's torch.

usage: build.py      prints both folders; exits with 2 and a line that says why where it cannot

The wheel is cached as those of setup are, and unpacked in the virtual environment beside the installed one.
"""

import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "launch"))

from steps import horovod, lanes, mpi, toolkit, tools  # noqa: E402
from steps.machine import Gpu  # noqa: E402
from steps.place import Place, digest  # noqa: E402
from steps.process import Failed, Missing, run, say  # noqa: E402

SOURCES = Path(__file__).parent / "stand_ins"
H100 = Gpu("Pretended GPU", "580.65.06", 9.0)
LANE = lanes.LANES["cuda"]


def find_tools(place: Place) -> tools.Tools:
    """A toolkit of this machine, else pip's."""
    environ = {**place.environ, **place.settings()}
    try:
        return tools.check(LANE, place, environ)
    except Missing as missing:
        say(f"{missing}; trying pip's")
        found = tools.check(LANE, place, environ, toolkit_later=True)
        try:
            return tools.Tools(found.cxx, found.cmake, toolkit.install_from_pip(place, LANE))
        except Failed as fault:
            raise Missing(str(fault)) from None


def build_horovod(place: Place, found: tools.Tools) -> Path:
    """The folder that has the CUDA lane's `horovod` package."""
    chosen_mpi = mpi.kept(place)
    ingredients = horovod.all_ingredients(place, LANE, found, chosen_mpi, [H100])
    key = digest(ingredients)[:16]
    folder = (
        place.venv / "lib" / "pretended_gpus" / key
    )  # so deep that the extension's path to libmpi is right
    if folder.exists():
        return folder
    built = horovod.Build(f"{horovod.VERSION}+{horovod.local_version()}", key, place.log(f"horovod-{key}"))
    wheel = horovod.cached_wheel(place, key) or horovod.build_wheel(
        place, LANE, found, chosen_mpi, ingredients, built
    )
    beside = folder.with_suffix(".new")
    zipfile.ZipFile(wheel).extractall(beside)
    beside.rename(folder)
    return folder


def build_stand_ins(place: Place, found: tools.Tools) -> Path:
    """A folder of libraries to preload, with the names that programs look for by hand."""
    sources = sorted(SOURCES.iterdir())
    key = digest([source.read_text() for source in sources], found.cxx.version, found.nvcc)[:16]
    folder = place.venv / "lib" / "pretended_gpus" / f"stand-ins-{key}"
    if folder.exists():
        return folder
    beside = folder.with_suffix(".new")
    beside.mkdir(parents=True, exist_ok=True)
    nccl = horovod.nccl_home(place, LANE)
    include = [f"-I{found.cuda.root / 'include'}", f"-I{nccl / 'include'}"]
    for name in ("gpu", "nccl"):
        run(
            f"pretended {name}",
            [
                *found.cxx.command.split(),
                "-std=c++17",
                "-O2",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-fPIC",
                "-shared",
            ]
            + [*include, SOURCES / f"{name}.cc", "-o", beside / f"libpretended_{name}.so", "-lpthread"],
            log=place.log(f"pretended-{name}"),
        )
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (beside / name).symlink_to("libpretended_gpu.so")
    beside.rename(folder)
    return folder


def main() -> int:
    place = Place(Path(sys.prefix))
    try:
        with place.locked():
            found = find_tools(place)
            print(build_stand_ins(place, found))
            print(build_horovod(place, found))
    except (Missing, Failed) as stop:
        print(f"no pretended GPUs here: {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
