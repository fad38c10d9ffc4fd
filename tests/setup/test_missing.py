"""What the machine lacks is said in one line with the fix, before any download; exit 2, no traceback."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from set_up_support import REPO, lanes, machine
from steps.process import Missing

GOOD = {
    "c++": 'case "$1" in -dumpversion) echo 12;; *) echo "g++ (Debian 12.2.0) 12.2.0";; esac',
    "cmake": "echo cmake version 3.25.1",
    "make": "true",
}


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line that setup stopped with."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "lane cpu" not in line]
    assert len(said) == 1, done.stderr
    return said[0]


@pytest.mark.parametrize("lacking, package", [("c++", "g++"), ("cmake", "cmake"), ("make", "make")])
def test_a_missing_tool_is_named_with_its_package(set_up, tool, tmp_path, lacking, package):
    for name, body in GOOD.items():
        if name != lacking:
            tool(name, body)
    line = refused(set_up())
    assert line.endswith(f"apt-get install {package}")
    assert not (tmp_path / "venv").exists()


def test_all_that_is_missing_is_reported_at_once(set_up):
    line = refused(set_up())
    assert line.endswith("apt-get install g++ cmake make")


def test_a_compiler_too_old_for_this_torch_is_refused(set_up, tool):
    for name, body in GOOD.items():
        tool(name, body.replace("12", "9"))
    assert "g++ 9, wanted >= 10" in refused(set_up())


@pytest.mark.parametrize(
    "environ, wanted",
    [
        ({}, "the k80 lane does not run here"),
        ({"HOROVOD_WITHOUT_CUDA": "1"}, "setup: no make: apt-get install make"),
    ],
)
def test_a_horovod_for_cpu_cores_needs_no_cuda_in_any_lane(set_up, tool, environ, wanted):
    """It then stops at what is missing next; nor does it matter that the lane does not run on this GPU."""
    tool("nvidia-smi", 'echo "NVIDIA H100, 580.65.06, 9.0"')
    for name, body in GOOD.items():
        if name != "make":
            tool(name, body)
    done = set_up("--lane", "k80", **environ)
    assert done.returncode == 2 and wanted in done.stderr.splitlines()[-1]


def test_an_old_cmake_is_refused(set_up, tool):
    for name, body in GOOD.items():
        tool(name, body.replace("3.25.1", "3.10.2"))
    assert "cmake version 3.10.2, wanted >= 3.13" in refused(set_up())


def test_a_python_without_its_venv_module_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(Missing, match=r"lacks the venv module: apt-get install python3\.\d+-venv$"):
        machine.check_python(lanes.LANES["cpu"])


def test_a_python_without_its_headers_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(Missing, match=r"lacks its headers .*: apt-get install python3\.\d+-dev$"):
        machine.check_python(lanes.LANES["cpu"])


@pytest.mark.parametrize("lane, minor, wheels", [("cpu", 15, "3.10 to 3.14"), ("k80", 12, "3.10 to 3.11")])
def test_a_python_that_torch_has_no_wheels_for_is_refused(monkeypatch, tool, tmp_path, lane, minor, wheels):
    monkeypatch.setattr(machine.sys, "version_info", (3, minor, 0))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        Missing, match=rf"this is Python 3\.{minor}; torch .* has wheels for Python {wheels}: install"
    ):
        machine.check_python(lanes.LANES[lane])
    tool("python3.10", "true")
    with pytest.raises(Missing, match="run `python3.10 launch/setup`"):
        machine.check_python(lanes.LANES[lane])


def test_a_python_too_old_for_anything_is_refused():
    old = next((found for minor in (9, 8, 7, 6) if (found := shutil.which(f"python3.{minor}"))), None)
    works = old and subprocess.run([old, "-c", ""], capture_output=True).returncode == 0
    if not works:
        pytest.skip("no Python older than 3.10 here")
    done = subprocess.run([old, REPO / "launch" / "setup"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "wanted >= 3.10" in done.stderr and "Traceback" not in done.stderr


def test_too_little_disk_space_is_reported_before_anything_is_written(here, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(20e9, 17e9, 3e9))
    with pytest.raises(Missing, match=r"3\.0 GB free for .*venv and .*horovod_owt, wanted 13 GB"):
        machine.check_space(here)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(20e9, 0, 20e9))
    machine.check_space(here)
    here.mark("packages", None)  # interrupted, when it had written much of that
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(20e9, 13e9, 7e9))
    machine.check_space(here)


def test_a_disk_that_is_really_small_is_refused(tool, tmp_path):
    for name, body in GOOD.items():
        tool(name, body)
    small = tmp_path / "small"
    small.mkdir()
    mount = f'mount -t tmpfs -o size=64m none "{small}" && exec "$@"'
    namespace = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if os.getuid() != 0 or subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(
        [*namespace, sys.executable, REPO / "launch" / "setup", "--venv", small / "venv"],
        timeout=60,
        env={"HOME": str(small), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
    )
    assert "0.1 GB free" in refused(done)


def test_a_folder_that_is_no_virtual_environment_is_left_alone(set_up, tool, tmp_path):
    for name, body in GOOD.items():
        tool(name, body)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").write_text("chapter 1")
    assert "exists and is not a virtual environment" in refused(set_up())
    assert [file.name for file in (tmp_path / "venv").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "options, venv, said",
    [
        ("ro", ".venv", "is not writable: choose another folder with --venv"),
        ("noexec", ".venv", "is mounted noexec, no library loads from it: choose another folder"),
        ("ro", "/tmp/owt", "is not writable, pip puts horovod_owt.egg-info there: copy it to"),
    ],
)
def test_a_mount_that_serves_no_set_up_is_refused(tool, tmp_path, options, venv, said):
    for name, body in GOOD.items():
        tool(name, body)
    checkout = tmp_path / "checkout"
    shutil.copytree(REPO / "launch", checkout / "launch")
    mount = f'mount --bind "$0" "$0" && mount -o remount,bind,{options} "$0" && cd "$0" && exec "$@"'
    namespace = ["unshare", "--mount", "sh", "-c", mount, str(checkout)]
    if os.getuid() != 0 or subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(
        [*namespace, sys.executable, "launch/setup", "--venv", venv],
        timeout=60,
        env={"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
    )
    assert said in refused(done)


def test_check_without_an_installation_is_refused(set_up):
    assert "run launch/setup first" in refused(set_up("--check"))
