"""The commands of the start scripts, as values."""

import subprocess
import sys
from pathlib import Path

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.launch.command import Start, check_folder_for_ssh
from horovod_owt.launch.elastic import ElasticJob
from horovod_owt.launch.hosts import read_hosts
from horovod_owt.parallel.interfaces import interface_between, interface_towards
from horovod_owt.topology import UNBOUND

LAUNCH = Path(__file__).parents[2] / "launch"
ENV = {"PATH": "/venv/bin", "HOME": "/root", "NCCL_DEBUG": "INFO", "AWS_SECRET": "x", "OMP_NUM_THREADS": "4"}


def words_after(argv: list[str], option: str) -> list[str]:
    return [word for before, word in zip(argv, argv[1:], strict=False) if before == option]


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_ranks_go_to_the_slots_of_their_hosts(launcher):
    start = Start(["my data", "--run-dir", "r"], {"n1": 4, "n2": 2}, "ib0")
    argv = start.argv(launcher, ENV)
    assert argv[0] == launcher and argv[-5:] == ["owt", "train", "my data", "--run-dir", "r"]
    assert words_after(argv, "-np") == ["6"]
    assert words_after(argv, {"horovodrun": "-H", "mpirun": "--host"}[launcher]) == ["n1:4,n2:2"]


def test_a_preflight_looks_at_the_trainings_data_and_run_folder_by_the_same_ranks():
    start = Start(["my data", "--set", "batch=8", "--run-dir=r"], {"n1": 4}, "ib0")
    training = start.argv("mpirun", ENV)
    ranks = training[: training.index("owt")]
    assert start.argv("mpirun", ENV, preflight=True) == [
        *ranks,
        "owt",
        "preflight",
        "my data",
        "--run-dir",
        "r",
    ]
    with pytest.raises(ConfigError, match="DATA first"):
        Start(["--run-dir", "r", "D"], {"n1": 4}, "ib0").argv("mpirun", ENV, preflight=True)


def test_mpirun_carries_what_ranks_need_and_no_secret():
    argv = Start(["D"], {"n1": 1, "n2": 1}, "eth0").argv("mpirun", ENV)
    assert words_after(argv, "-x") == ["NCCL_DEBUG", "OMP_NUM_THREADS", "PATH"]


def test_between_hosts_one_interface_is_told_to_everybody_and_on_a_box_none():
    env = Start(["D"], {"n1": 1, "n2": 1}, "eth0").environment()
    assert env.pop(UNBOUND) == "1"
    assert env["NCCL_SOCKET_IFNAME"] == env["OMPI_MCA_btl_tcp_if_include"] == "eth0"
    assert words_after(Start(["D"], {"n1": 1}, "eth0").argv("horovodrun", ENV), "--network-interfaces") == [
        "eth0"
    ]
    assert Start(["D"], {"localhost": 4}, "lo").environment() == {UNBOUND: "1"}


@pytest.mark.parametrize(
    "line", ["gpu07", "$(touch x):4", "a;b:4", "gpu07:", ":4", "gpu07:0", "gpu07 4 slots", "gpu07:-1"]
)
def test_a_line_that_is_no_host_is_named(tmp_path, line):
    (tmp_path / "hosts").write_text(f"n1:4\n{line}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        read_hosts(tmp_path / "hosts")
    assert "wanted HOST:SLOTS" in str(caught.value)


def test_a_file_without_hosts_is_refused(tmp_path):
    (tmp_path / "hosts").write_text("# n1:4\n\n")
    with pytest.raises(ConfigError, match="no host in"):
        read_hosts(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="No such file"):
        read_hosts(tmp_path / "other")


@pytest.mark.parametrize("script", ["horovodrun", "mpirun", "elastic", "supervise"])
def test_each_start_script_tells_what_it_does_and_refuses_nonsense(script, tmp_path):
    def says(*words: str) -> tuple[int, str]:
        argv = [sys.executable, LAUNCH / script, *words]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, said = says("--help")
    assert code == 0 and "examples:" in said and f"launch/{script} " in said
    assert says("--max-restarts", "-1", "--", "D", "--run-dir", "r")[0] == 2
    if script != "supervise":
        (tmp_path / "hosts").write_text("localhost:1\n")
        code, said = says("--hosts", "hosts", "--interface", "lo; touch x", "--", "D", "--run-dir", "r")
        assert code == 2 and "--interface lo; touch x; wanted one of" in said and "lo" in said
        assert not (tmp_path / "x").exists()


def test_horovodruns_ssh_is_not_given_a_folder_that_its_shell_would_misread():
    check_folder_for_ssh("/home/me/runs-1")
    with pytest.raises(ConfigError, match="launch/mpirun"):
        check_folder_for_ssh("/home/me/$(touch x)")


def test_an_elastic_job_that_could_never_start_is_refused():
    with pytest.raises(ConfigError, match="at least 4 ranks, of 2 at most"):
        ElasticJob(["D"], interface="lo", places=2, min_ranks=4)


def test_the_interface_is_that_of_the_route(monkeypatch):
    assert interface_towards("localhost") == interface_between(["127.0.0.1", "localhost"]) == "lo"
    ways = {"n1": "eth0", "n2": "eth0", "me": "lo", "n3": "ib0"}
    with monkeypatch.context() as faked:
        faked.setattr("horovod_owt.parallel.interfaces.interface_towards", ways.get)
        assert interface_between(["n1", "me", "n2"]) == "eth0"
        with pytest.raises(ConfigError, match="n1 by eth0, me by lo, n3 by ib0"):
            interface_between(["n1", "me", "n3"])
    with pytest.raises(ConfigError, match="no route from here to host"):
        interface_towards("no-such-host.invalid")
