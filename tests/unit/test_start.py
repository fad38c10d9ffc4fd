"""The commands of the start scripts, as values."""

import pytest

from horovod_owt.errors import ConfigError
from horovod_owt.jobs.hosts import read_hosts
from horovod_owt.jobs.interfaces import interface_between, interface_towards
from horovod_owt.jobs.start import Start

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
    assert env["NCCL_SOCKET_IFNAME"] == env["OMPI_MCA_btl_tcp_if_include"] == "eth0"
    assert words_after(Start(["D"], {"n1": 1}, "eth0").argv("horovodrun", ENV), "--network-interfaces") == [
        "eth0"
    ]
    assert Start(["D"], {"localhost": 4}, "lo").environment() == {}


@pytest.mark.parametrize("line", ["gpu07", "gpu07:", ":4", "gpu07:0", "gpu07 4 slots", "gpu07:-1"])
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


def test_the_interface_is_that_of_the_route(monkeypatch):
    assert interface_towards("localhost") == interface_between(["127.0.0.1", "localhost"]) == "lo"
    ways = {"n1": "eth0", "n2": "eth0", "me": "lo", "n3": "ib0"}
    with monkeypatch.context() as faked:
        faked.setattr("horovod_owt.jobs.interfaces.interface_towards", ways.get)
        assert interface_between(["n1", "me", "n2"]) == "eth0"
        with pytest.raises(ConfigError, match="n1 by eth0, me by lo, n3 by ib0"):
            interface_between(["n1", "me", "n3"])
    with pytest.raises(ConfigError, match="no way from here to host"):
        interface_towards("no-such-host.invalid")
