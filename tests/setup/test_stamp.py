"""The stamp: what makes a second run do nothing, and what makes it work again."""

import os
import subprocess
import sys
import time
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest
from set_up_support import REPO, installed, packages, place, process


@pytest.fixture
def done(here, tool, monkeypatch, tmp_path) -> place.Place:
    """A finished setup as the stamp sees it, over a small checkout of its own."""
    launch = tmp_path / "checkout" / "launch"
    for file, text in {
        "setup": "",
        "steps/a.py": "",
        "constraints/cpu.txt": "torch==2.14.1",
        "horovod/a.patch": "diff",
        "../setup.cfg": "[options]",
        "../pyproject.toml": "",
    }.items():
        (launch / file).parent.mkdir(parents=True, exist_ok=True)
        (launch / file).write_text(text)
    monkeypatch.setattr(place, "REPO", launch.parent)
    monkeypatch.setattr(place, "LAUNCH", launch)
    monkeypatch.setattr(place, "PATCHES", [launch / "horovod" / "a.patch"])
    here.bin.mkdir(parents=True)
    for name in ("python", "horovodrun"):
        (here.bin / name).touch()
    (here.venv / "pyvenv.cfg").write_text("version = 3.11.7")
    here.keep_settings("cpu")
    here.finish([])
    assert again(here).up_to_date(None)
    return here


def again(here: place.Place, **environ: str) -> place.Place:
    """The next run of setup, with only the files to go by."""
    return place.Place(here.venv, {**here.environ, **environ})


@pytest.mark.parametrize(
    "file",
    [
        "launch/setup",
        "launch/steps/a.py",
        "launch/constraints/cpu.txt",
        "launch/horovod/a.patch",
        "setup.cfg",
        "pyproject.toml",
    ],
)
def test_a_changed_file_means_work(done, file):
    (place.REPO / file).write_text("changed")
    assert not again(done).up_to_date(None)


def test_another_python_means_work(done):
    (done.venv / "pyvenv.cfg").write_text("version = 3.12.1")
    assert not again(done).up_to_date(None)


def test_a_python_that_the_system_has_replaced_means_work(done, tmp_path):
    base = tmp_path / "python3"
    for version in ("3.11", "3.13"):
        (tmp_path / f"python{version}").touch()
    base.symlink_to("python3.11")
    done.python.unlink()
    done.python.symlink_to(base)
    done.finish([])
    assert again(done).up_to_date(None)
    base.unlink()
    base.symlink_to("python3.13")
    assert not again(done).up_to_date(None)


def test_in_place_of_a_python_that_is_gone_comes_this_one_without_the_packages(done, tmp_path, monkeypatch):
    done.python.unlink()
    (done.bin / "python3.11").symlink_to(tmp_path / "gone")
    done.python.symlink_to("python3.11")
    done.mark("packages", "digest")

    def venv(label, argv, **_):
        assert not any(link.is_symlink() for link in done.bin.glob("python*"))  # venv would leave them
        done.python.symlink_to(sys.executable)

    monkeypatch.setattr(packages, "run", venv)
    packages.make_venv(done)
    assert not done.was_begun("packages") and not again(done).was_begun("packages")


def test_another_lane_means_work_and_no_lane_means_the_kept_one(done):
    assert again(done).up_to_date("cpu")
    assert not again(done).up_to_date("cuda")


def test_a_build_setting_stays_until_another_is_given(done):
    given = again(done, HOROVOD_BUILD_ARCH_FLAGS="-mavx")
    assert not given.up_to_date(None)
    given.keep_settings("cpu")
    given.finish([])
    assert again(done).up_to_date(None)  # `make test`, without the variable
    assert again(done).settings() == {"HOROVOD_BUILD_ARCH_FLAGS": "-mavx"}
    assert not again(done, HOROVOD_BUILD_ARCH_FLAGS="-mfma").up_to_date(None)
    without = again(done, HOROVOD_BUILD_ARCH_FLAGS="")
    assert not without.up_to_date(None) and without.settings() == {}


def test_a_cuda_module_is_no_reason_to_build_the_cpu_lane_again(done):
    assert again(done, CUDA_HOME="/opt/cuda-13.0").up_to_date(None)
    done.keep_settings("cuda")
    done.finish([])
    assert not again(done, CUDA_HOME="/opt/cuda-13.0").up_to_date(None)


def test_a_lane_without_gpus_stays_so(done):
    without = again(done, HOROVOD_WITHOUT_CUDA="1")
    without.keep_settings("k80")
    without.finish([])
    assert again(done).without_gpus() and again(done).up_to_date(None)  # `make test`, without the variable
    assert not again(done, HOROVOD_WITHOUT_CUDA="0").up_to_date(None)


def test_an_mpi_that_comes_onto_the_path_means_work_one_that_leaves_does_not(done, tool):
    mpicc = tool("mpicc", "true")
    tool("mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    assert not again(done).up_to_date(None)
    now = again(done)
    now.stamp["mpi"] = {"source": "site", "mpicc": str(mpicc), "version": "4.1.4"}
    now.finish([])
    assert again(done).up_to_date(None)
    mpicc.unlink()
    assert again(done).up_to_date(None)


def test_an_interrupted_run_is_not_done_but_keeps_its_steps(done):
    now = again(done)
    now.mark("packages", "digest")
    now.keep_settings("cpu")  # where every run starts
    after = again(done)
    assert not after.up_to_date(None)
    assert after.is_done("packages", "digest") and not after.is_done("packages", "other")


def test_a_damaged_stamp_counts_as_none(done):
    done.stamp_file.write_text('{"steps": ')
    assert not again(done).up_to_date(None)


def test_a_removed_horovodrun_means_work(done):
    (done.bin / "horovodrun").unlink()
    assert not again(done).up_to_date(None)


def test_the_cache_is_for_its_user_alone(here, monkeypatch):
    with here.locked():
        assert here.cache.stat().st_mode & 0o777 == 0o700
    here.cache.chmod(0o775)
    (here.cache / "lock").write_text("kept")
    with here.locked():
        assert here.cache.stat().st_mode & 0o777 == 0o755 and (here.cache / "lock").read_text() == "kept"
    monkeypatch.setattr(place.os, "geteuid", lambda: 12345)
    with pytest.raises(
        process.Missing, match="belongs to user .* wanted one of user 12345: set XDG_CACHE_HOME"
    ):
        with here.locked():
            pass


def test_a_link_in_place_of_the_caches_lock_empties_nothing(here, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    here.cache.mkdir(parents=True)
    (here.cache / "lock").symlink_to(precious)
    with pytest.raises(OSError):
        with here.locked():
            pass
    assert precious.read_text() == "kept"


def test_a_second_set_up_waits_for_the_first(here, tool, tmp_path):
    here.cache.mkdir(parents=True)
    with (here.cache / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        second = subprocess.Popen(
            [sys.executable, REPO / "launch" / "setup", "--venv", tmp_path / "venv"],
            env={"HOME": here.environ["HOME"], "PATH": here.environ["PATH"]},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "another setup is using" in second.stderr.readline()
        assert second.poll() is None
    _, said = second.communicate(timeout=30)  # then its turn comes: this PATH has no compiler
    assert second.returncode == 2 and "no C++ compiler" in said


@pytest.mark.alone
def test_nothing_to_do_takes_no_time():
    here = installed()
    if not here.up_to_date(None):
        pytest.skip(f"{here.venv} was not set up from this state of the checkout")
    start = time.monotonic()
    done = subprocess.run(
        [REPO / "launch" / "setup", "--venv", here.venv], capture_output=True, text=True, timeout=30
    )
    elapsed_s = time.monotonic() - start
    assert done.returncode == 0 and "up to date" in done.stderr
    assert elapsed_s < 2


def test_children_see_neither_another_job_nor_another_python(tmp_path):
    outer = {
        "PATH": "/usr/bin",
        "HOME": "/h",
        "OMPI_COMM_WORLD_RANK": "3",
        "HOROVOD_RANK": "3",
        "SLURM_JOB_ID": "1",
        "LSB_JOBID": "1",  # horovodrun would end with KeyError: 'CSM_ALLOCATION_ID'
        "PBS_JOBID": "1",
        "PYTHONPATH": "/elsewhere",
        "PIP_PREFIX": "/elsewhere",
        "PIP_NO_DEPS": "1",
        "PIP_INDEX_URL": "https://mirror/simple",
        "CMAKE_GENERATOR": "Ninja",  # with which Horovod's build ends: unknown target 'VERBOSE=1'
        "LD_LIBRARY_PATH": "/opt/mpi/lib",
    }
    env = place.Place(tmp_path, outer).child_env()
    assert env == {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin",
        "HOME": "/h",
        "LD_LIBRARY_PATH": "/opt/mpi/lib",
        "PIP_INDEX_URL": "https://mirror/simple",
        "VIRTUAL_ENV": str(Path(tmp_path)),
    }


def test_pip_installs_into_the_virtual_environment_whatever_its_own_settings_say(tmp_path):
    """`user = true`, as clusters advise who has no virtual environment, would end each of its calls.

    So would constraints of a site, or of NVIDIA's containers: versions that are not the lane's.
    """
    (tmp_path / "constraints.txt").write_text("pip==1.0\n")
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[install]\nuser = true\nconstraint = {tmp_path}/constraints.txt\n")
    environ = {**os.environ, "PIP_CONFIG_FILE": str(settings), "XDG_CACHE_HOME": str(tmp_path)}
    environ["PIP_CONSTRAINT"] = f"{tmp_path}/constraints.txt"
    here = place.Place(Path(sys.prefix), environ)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "pip"]
    done = subprocess.run(pip, env=here.build_env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "already satisfied" in done.stdout, done.stderr
