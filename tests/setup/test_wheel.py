"""The wheel of Horovod: its key changes with whatever changes the build, and a damaged one is not used."""

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from set_up_support import horovod, installed, lanes, mpi, place, process
from steps.compiler import Compiler
from steps.machine import Gpu
from steps.toolkit import Toolkit
from steps.tools import Tools

GCC_12 = Compiler("/usr/bin/c++", "g++ (Debian 12.2.0-14) 12.2.0", 12)
TOOLS = Tools(GCC_12, "cmake version 3.25.1")
MPI = mpi.Mpi("pip", "/venv/bin/mpicc", "mpirun (Open MPI) 5.0.11")
ANSWER = '["2.14.1", "cpython-311-x86_64-linux-gnulinux-x86_64"]'


@pytest.fixture
def key(here, monkeypatch, tmp_path):
    """The key of a build, with some of what it depends on changed."""
    patch = tmp_path / "a.patch"

    def of(
        *,
        torch=ANSWER,
        lane="cpu",
        tools=TOOLS,
        chosen=MPI,
        gpus=(),
        diff="-a\n+b",
        header="Why",
        cpu=("avx",),
        libc=("glibc", "2.36"),
        **environ,
    ):
        patch.write_text(f"{header}\n\ndiff --git a/x b/x\n{diff}\n")
        monkeypatch.setattr(horovod, "PATCHES", [patch])
        monkeypatch.setattr(horovod, "ask", lambda argv: torch)
        monkeypatch.setattr(horovod, "build_cpu_flags", lambda: list(cpu))
        monkeypatch.setattr(horovod.platform, "libc_ver", lambda: libc)
        where = place.Place(here.venv, {**here.environ, **environ})
        return place.digest(horovod.all_ingredients(where, lanes.LANES[lane], tools, chosen, gpus))

    return of


@pytest.mark.parametrize(
    "change",
    [
        {"torch": ANSWER.replace("2.14.1", "2.13.0")},
        {"torch": ANSWER.replace("311", "312")},
        {"lane": "cuda"},
        {"tools": replace(TOOLS, cxx=replace(GCC_12, version="g++ (Debian 13.3.0-1) 13.3.0"))},
        {"tools": replace(TOOLS, cuda=Toolkit(Path("/usr/local/cuda"), "13.0"))},
        {"chosen": mpi.NO_MPI},
        {"chosen": replace(MPI, version="mpirun (Open MPI) 4.1.4")},
        {"chosen": replace(MPI, source="site")},
        {"diff": "-a\n+c"},
        {"cpu": ("avx", "fma")},
        {"libc": ("glibc", "2.28")},  # of an older host that shares the home
        {"HOROVOD_BUILD_ARCH_FLAGS": "-mavx"},
        {"CXX": "g++-11"},
    ],
    ids=str,
)
def test_the_key_changes_with(key, change):
    assert key(**change) != key()


def test_the_key_changes_with_the_source_archive(key, monkeypatch):
    before = key()
    monkeypatch.setattr(horovod, "SHA256", "0" * 64)
    assert key() != before


def test_the_key_has_the_torch_of_the_virtual_environment_not_one_on_pythonpath(monkeypatch, tmp_path):
    """As a cluster's PyTorch module puts there; the build does not see it."""
    metadata = tmp_path / "torch-1.13.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.13.1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = horovod.all_ingredients(installed(), lanes.LANES["cpu"], TOOLS, MPI, ())
    assert found["torch"] not in (None, "1.13.1")


@pytest.mark.parametrize(
    "change",
    [
        {"header": "Why, in better words"},
        {"chosen": replace(MPI, mpicc="/another/venv/bin/mpicc")},  # the wheel finds libmpi beside itself
        {"tools": replace(TOOLS, cmake="cmake version 4.0.1")},
        {"gpus": [Gpu("H100", "580", 9.0)]},  # in the cpu lane
    ],
    ids=str,
)
def test_the_key_does_not_change_with(key, change):
    assert key(**change) == key()


def test_the_cpu_does_not_matter_where_the_flags_are_given(key):
    assert key(cpu=(), HOROVOD_BUILD_ARCH_FLAGS="-mavx") == key(HOROVOD_BUILD_ARCH_FLAGS="-mavx")


def test_a_damaged_wheel_is_not_used(here):
    folder = here.cache / "wheels" / "key"
    folder.mkdir(parents=True)
    assert horovod.cached_wheel(here, "key") is None
    wheel = folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("horovod/__init__.py", "x = 1\n" * 1000)
    assert horovod.cached_wheel(here, "key") == wheel
    whole = wheel.read_bytes()
    for damaged in (whole[:-200], whole[:100].replace(b"x = 1", b"x = 2") + whole[100:], b""):
        wheel.write_bytes(damaged)
        assert horovod.cached_wheel(here, "key") is None


@pytest.mark.parametrize("blank", ["venv", "cache"])
def test_a_build_sees_no_blanks_in_its_folders_names(tmp_path, blank):
    """FindMPI splits `mpicc -show` at blanks; the names end in the library, so they are the user's own."""
    folders = {"venv": tmp_path / "venv", "cache": tmp_path / "cache"}
    folders[blank] = tmp_path / "Übung mit Leerzeichen" / blank
    for folder in folders.values():
        folder.mkdir(parents=True)
    environ = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(folders["cache"])}
    there = place.Place(folders["venv"], environ)
    with there.named_without_blanks() as named:
        assert not place.has_blank(f"{named.venv}{named.cache}") and named.venv.is_relative_to(tmp_path)
        assert named.venv.samefile(there.venv)
        named.scratch.mkdir(parents=True)
        assert not place.has_blank(os.path.realpath(named.scratch)), "CMake resolves the folder it works in"
        named.log("build").write_text("kept")
    assert there.log("build").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    with (
        pytest.raises(process.Missing, match="has a blank.*use --venv and XDG_CACHE_HOME"),
        place.Place(folders["venv"], environ | {"HOME": f"{tmp_path}/a b"}).named_without_blanks(),
    ):
        pass


def test_without_blanks_the_names_stay(here):
    with here.named_without_blanks() as named:
        assert named is here
