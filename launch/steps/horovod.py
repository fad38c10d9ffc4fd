"""Build Horovod from its source archive (checked by hash) and our patches; builds are cached."""

import json
import os
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steps import patches
from steps.lanes import Lane
from steps.machine import Gpu, build_cpu_flags
from steps.mpi import Mpi
from steps.packages import pip
from steps.place import PATCHES, Place, digest, file_digest, patch_digest
from steps.process import Failed, ask, run, say
from steps.tools import Tools

VERSION = "0.28.1"  # the last release, June 2023
SDIST = f"horovod-{VERSION}.tar.gz"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
JOB_MEMORY_GB = 2  # the largest file of torch's extension takes 1.5 GB to compile

# From horovod/torch/mpi_lib_v2.so to the lib folder of the virtual environment that it is installed in. pip's
# libmpi is there; a cached wheel must not load libmpi from the environment that it was built in.
RELATIVE_RPATH = "-Wl,-rpath,$ORIGIN/../../../.."


@dataclass(frozen=True)
class Build:
    version: str  # in pip's notation: 0.28.1+owt.<patches>
    key: str
    log: Path


def local_version() -> str:
    """The local version that identifies our patches in `pip list`."""
    return f"owt.{digest([patch_digest(patch) for patch in PATCHES])[:8]}"


def build(place: Place, lane: Lane, tools: Tools, mpi: Mpi, gpus: Sequence[Gpu]) -> Build:
    """Install the Horovod that matches the virtual environment, from the cache or built now."""
    ingredients = all_ingredients(place, lane, tools, mpi, gpus)
    key = digest(ingredients)[:16]
    built = Build(f"{VERSION}+{local_version()}", key, place.log(f"horovod-{key}"))
    if place.is_done("horovod", key):
        return built
    place.mark("horovod", None)
    wheel = cached_wheel(place, key)
    if wheel is None:
        with place.named_without_blanks() as named:
            build_wheel(named, lane, tools, mpi, ingredients, built)
        wheel = next((place.cache / "wheels" / key).glob("*.whl"))
    else:
        say(f"Horovod {built.version}: from the cache ({wheel})")
    pip(place, "horovod-install", "install", "--no-deps", "--force-reinstall", wheel)
    place.mark("horovod", key)
    return built


def all_ingredients(
    place: Place, lane: Lane, tools: Tools, mpi: Mpi, gpus: Sequence[Gpu]
) -> dict[str, object]:
    """Everything that a wheel depends on; its digest is the wheel's key in the cache."""
    torch, abi = json.loads(
        ask(
            [
                place.python,
                "-I",  # whatever a module has put on PYTHONPATH
                "-c",
                (
                    "import json, sysconfig; from importlib.metadata import version;"
                    "abi = sysconfig.get_config_var('SOABI') + ' ' + sysconfig.get_platform();"
                    "print(json.dumps([version('torch'), abi]))"
                ),
            ]
        )
        or "[null, null]"
    )
    if torch is None:
        raise Failed(f"{place.venv} has no torch: delete {place.stamp_file} and run this again")
    settings = place.settings()
    return {
        "horovod": SHA256,
        "patches": {patch.name: patch_digest(patch) for patch in PATCHES},
        "torch": torch,
        "python": abi,
        "libc": " ".join(platform.libc_ver()),  # hosts that share a home may differ
        "mpi": [mpi.source, mpi.version, os.path.realpath(mpi.mpicc) if mpi.source == "site" else ""],
        "lane": lane.name,
        "compiler": tools.cxx.version,
        "nvcc": tools.nvcc,
        "settings": settings,
        "cpu": None if "HOROVOD_BUILD_ARCH_FLAGS" in settings else build_cpu_flags(),
        "gpu": sorted({str(gpu.compute_capability) for gpu in gpus}) if lane.cuda_major else None,
    }


def cached_wheel(place: Place, key: str) -> Path | None:
    """The wheel of an earlier build, if it is undamaged."""
    for wheel in (place.cache / "wheels" / key).glob("*.whl"):
        try:
            if zipfile.ZipFile(wheel).testzip() is None:
                return wheel
        except (zipfile.BadZipFile, OSError):
            pass
        say(f"{wheel} is damaged: building it again")
    return None


def build_wheel(
    place: Place, lane: Lane, tools: Tools, mpi: Mpi, ingredients: dict[str, object], built: Build
) -> Path:
    """Unpack, patch, compile; the wheel is moved to the cache atomically."""
    source = patched_source(place, fetch_sdist(place))
    out = place.scratch / "wheel"
    env = {**place.build_env(), **build_settings(place, lane, tools, mpi, ingredients)}
    run(
        f"building Horovod {built.version}",
        [
            place.python,
            "-m",
            "pip",
            "wheel",
            "--verbose",
            "--no-build-isolation",
            "--no-deps",
            "--no-cache-dir",
            "--wheel-dir",
            out,
            source,
        ],
        log=built.log,
        env=env,
        cwd=place.scratch,
    )
    (out / "built-from.json").write_text(json.dumps(ingredients, indent=1) + "\n", encoding="utf-8")
    kept = place.cache / "wheels" / built.key
    beside = kept.with_suffix(".new")
    for stale in (kept, beside):
        shutil.rmtree(stale, ignore_errors=True)
    kept.parent.mkdir(exist_ok=True)
    shutil.move(out, beside)  # the scratch folder may be on another file system
    beside.replace(kept)
    shutil.rmtree(source, ignore_errors=True)  # what stays, the next setup deletes
    return next(kept.glob("*.whl"))


def fetch_sdist(place: Place) -> Path:
    """Download Horovod's source archive with pip, so from the user's own index; the hash is checked."""
    folder = place.cache / "sdist"
    archive = folder / SDIST
    if archive.exists() and file_digest(archive) == SHA256:
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    archive.unlink(missing_ok=True)
    wanted = place.scratch / "horovod.txt"
    place.scratch.mkdir(parents=True, exist_ok=True)
    wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    pip(
        place,
        "sdist",
        "download",
        "--no-deps",
        "--no-binary",
        "horovod",
        "--no-build-isolation",
        "--require-hashes",
        "--dest",
        folder,
        "-r",
        wanted,
    )
    if not archive.exists() or file_digest(archive) != SHA256:
        raise Failed(f"{archive} is not Horovod {VERSION}'s source archive (sha256 {SHA256[:12]}...)")
    return archive


def patched_source(place: Place, archive: Path) -> Path:
    """A fresh source tree with all patches applied; a patch that does not apply is an error."""
    shutil.rmtree(place.scratch, ignore_errors=True)
    place.scratch.mkdir(parents=True)
    shutil.unpack_archive(
        archive, place.scratch, **({"filter": "data"} if sys.version_info >= (3, 12) else {})
    )
    source = place.scratch / f"horovod-{VERSION}"
    patches.apply(PATCHES, source)
    return source


def build_settings(
    place: Place, lane: Lane, tools: Tools, mpi: Mpi, ingredients: dict[str, object]
) -> dict[str, str]:
    """The environment variables for Horovod's setup.py and CMake files."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    jobs = max(1, min(len(os.sched_getaffinity(0)), int(memory_gb / JOB_MEMORY_GB)))
    settings = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI" if mpi.there else "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_LOCAL_VERSION": local_version(),
        "LDFLAGS": RELATIVE_RPATH,
        "MAKEFLAGS": f"-j{jobs}",
        "CXX": tools.cxx.command,
        **mpicc_paths(place, mpi),
        **({"CC": tools.cxx.c_compiler} if tools.cxx.c_compiler else {}),
    }
    if lane.cuda_major is None:
        return {**settings, "HOROVOD_WITHOUT_CUDA": "1", **place.settings()}
    settings |= {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_CUDA_HOME": str(tools.cuda.root),
        "CUDA_HOME": str(tools.cuda.root),
        "HOROVOD_NCCL_HOME": str(nccl_home(place, lane)),
        "HOROVOD_NCCL_LINK": "SHARED",
    }
    seen = [re.sub(r"\D", "", capability) for capability in ingredients["gpu"] if capability != "None"]
    if lane.name == "k80":
        seen = seen or ["37"]
    if seen:
        settings["HOROVOD_BUILD_CUDA_CC_LIST"] = ",".join(
            seen
        )  # building for all architectures takes twice as long
    return {**settings, **place.settings()}  # the user's environment has precedence


def mpicc_paths(place: Place, mpi: Mpi) -> dict[str, str]:
    """Make pip's mpicc name its folders as `place` does: it sets OPAL_PREFIX itself, to their real names."""
    if mpi.source != "pip":
        return {}
    return {"OPAL_INCLUDEDIR": str(place.venv / "include"), "OPAL_LIBDIR": str(place.venv / "lib")}


def nccl_home(place: Place, lane: Lane) -> Path:
    """A folder in the layout that CMake expects, with links to the NCCL that torch loads."""
    found = ask(
        [
            place.python,
            "-I",
            "-c",
            (
                "from importlib.metadata import files;"
                f"print(next(f.locate() for f in files('{lane.nccl_package}') if f.name == 'libnccl.so.2'))"
            ),
        ]
    )
    if not found:
        raise Failed(f"{place.venv} has no {lane.nccl_package}: delete {place.stamp_file} and run this again")
    library = Path(found).resolve()
    home = place.venv / "nccl"
    (home / "lib").mkdir(parents=True, exist_ok=True)
    links = {home / "include": library.parents[1] / "include"}
    links |= {home / "lib" / name: library for name in ("libnccl.so", "libnccl.so.2")}
    for link, target in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return home
