"""The commands of `owt launch`, as values."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from horovod.runner import launch as horovod_launch
from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.elastic.discovery import HostDiscoveryScript
from horovod.runner.gloo_run import _slot_info_to_command_fn
from horovod.runner.util import remote

from horovod_owt.cli import cli
from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.launch import horovodrun
from horovod_owt.launch.command import HOROVODRUN, Start, check_folder_for_ssh
from horovod_owt.launch.elastic import DISCOVER_HOSTS, ElasticJob
from horovod_owt.launch.horovodrun import discover_without_python, drop_invalid_names
from horovod_owt.launch.hosts import read_hosts
from horovod_owt.parallel.interfaces import interface_between, interface_towards
from horovod_owt.topology import UNBOUND, Launcher

LAUNCH = Path(__file__).parents[2] / "launch"
ENV = {"PATH": "/venv/bin", "HOME": "/root", "NCCL_DEBUG": "INFO", "AWS_SECRET": "x", "OMP_NUM_THREADS": "4"}


def words_after(argv: list[str], option: str) -> list[str]:
    return [word for before, word in zip(argv, argv[1:], strict=False) if before == option]


@pytest.mark.parametrize("launcher", [Launcher.GLOO, Launcher.MPIRUN])
def test_ranks_go_to_the_slots_of_their_hosts(launcher):
    argv = Start(launcher, ["my data", "--run-dir", "r"], {"n1": 4, "n2": 2}, "ib0").argv(ENV)
    first = {Launcher.GLOO: list(HOROVODRUN), Launcher.MPIRUN: ["mpirun"]}[launcher]
    assert argv[: len(first)] == first and argv[-5:] == ["owt", "train", "my data", "--run-dir", "r"]
    assert words_after(argv, "-np") == ["6"]
    assert words_after(argv, {Launcher.GLOO: "-H", Launcher.MPIRUN: "--host"}[launcher]) == ["n1:4,n2:2"]


def test_a_preflight_looks_at_the_trainings_data_and_run_folder_by_the_same_ranks():
    start = Start(Launcher.MPIRUN, ["my data", "--set", "batch=8", "--run-dir=r"], {"n1": 4}, "ib0")
    training = start.argv(ENV)
    ranks = training[: training.index("owt")]
    assert start.argv(ENV, preflight=True) == [
        *ranks,
        "owt",
        "preflight",
        "my data",
        "--run-dir",
        "r",
    ]
    with pytest.raises(ConfigError, match="DATA first"):
        Start(Launcher.MPIRUN, ["--run-dir", "r", "D"], {"n1": 4}, "ib0").argv(ENV, preflight=True)


def test_mpirun_carries_what_ranks_need_and_no_secret():
    argv = Start(Launcher.MPIRUN, ["D"], {"n1": 1, "n2": 1}, "eth0").argv(ENV)
    assert words_after(argv, "-x") == ["NCCL_DEBUG", "OMP_NUM_THREADS", "PATH"]


def test_between_hosts_one_interface_is_set_for_all_libraries_and_on_one_host_none():
    env = Start(Launcher.MPIRUN, ["D"], {"n1": 1, "n2": 1}, "eth0").environment()
    assert env.pop(UNBOUND) == "1"
    assert env["OMPI_MCA_btl_tcp_if_include"] == "eth0" and env["NCCL_SOCKET_IFNAME"] == "=eth0"
    over_gloo = Start(Launcher.GLOO, ["D"], {"n1": 1}, "eth0").argv(ENV)
    assert words_after(over_gloo, "--network-interfaces") == ["eth0"]
    assert Start(Launcher.GLOO, ["D"], {"localhost": 4}, "lo").environment() == {UNBOUND: "1"}


@pytest.mark.parametrize(
    "line", ["gpu07", "$(touch x):4", "a;b:4", "gpu07:", ":4", "gpu07:0", "gpu07 4 slots", "gpu07:-1"]
)
def test_a_line_that_is_no_host_is_named(tmp_path, line):
    (tmp_path / "hosts").write_text(f"n1:4\n{line}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        read_hosts(tmp_path / "hosts")
    assert "wanted HOST:SLOTS" in str(caught.value)


@pytest.mark.parametrize("line", ["[::1]:4", "fd00::11:4", "fd00::11 slots=4"])
def test_an_ipv6_address_needs_a_name(tmp_path, line):
    (tmp_path / "hosts").write_text(f"n1:4\n{line}\n")
    with pytest.raises(ConfigError, match="line 2.*no IPv6 addresses; fix: give the address a name"):
        read_hosts(tmp_path / "hosts")


@pytest.mark.parametrize("own", ["localhost", "127.0.0.1", "127.0.1.1", "localhost.localdomain"])
def test_a_name_that_only_its_host_knows_is_refused_beside_others(tmp_path, own):
    (tmp_path / "hosts").write_text(f"n2:1\n{own}:2\n")
    with pytest.raises(ConfigError, match=f"has {own} beside n2; .*fix: {socket.gethostname()} in place of"):
        read_hosts(tmp_path / "hosts")
    (tmp_path / "hosts").write_text(f"{own}:2\n")
    assert read_hosts(tmp_path / "hosts") == {own: 2}


def test_a_file_without_hosts_is_refused(tmp_path):
    (tmp_path / "hosts").write_text("# n1:4\n\n")
    with pytest.raises(ConfigError, match="no host in"):
        read_hosts(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="No such file"):
        read_hosts(tmp_path / "other")


def test_a_file_of_hosts_reads_as_the_discovery_script_prints_it(tmp_path):
    file = tmp_path / "x=y"
    text = "n1:4\r\n\n  n2  slots=2 # old\nn3\tslots=1 max_slots=4\nn1:2\nn4 max-slots=8 slots=3\n# all\n"
    file.write_text(f"\ufeff{text}", encoding="utf-8")
    said = subprocess.run(
        ["sh", DISCOVER_HOSTS, file.name], capture_output=True, text=True, cwd=tmp_path, timeout=20
    )
    assert said.stdout.split() == [f"{host}:{slots}" for host, slots in read_hosts(file).items()]
    assert read_hosts(file) == {"n1": 6, "n2": 2, "n3": 1, "n4": 3}


def owt(*words: str) -> tuple[int, str]:
    """The exit code of a command, and what it printed or why it was refused."""
    try:
        done = CliRunner().invoke(cli, [*map(str, words)])
        if isinstance(done.exception, OwtError):
            return done.exception.exit_code, str(done.exception)
        return done.exit_code, done.output
    finally:
        assert done.exception is None or isinstance(done.exception, (OwtError, SystemExit)), done.exc_info


@pytest.mark.parametrize("command", ["local", "hosts", "mpirun", "elastic", "supervise"])
def test_each_way_to_launch_shows_its_command_and_refuses_nonsense(command, tmp_path):
    (tmp_path / "hosts").write_text("localhost:1\nlocalhost:1\n")
    place = {"hosts": ["--hosts", tmp_path / "hosts"], "supervise": []}.get(command, ["--ranks", 2])
    train = (
        ["horovodrun", "owt", "train", "D", "--run-dir", "r"]
        if command == "supervise"
        else ["D", "--run-dir", "r"]
    )
    code, said = owt("launch", command, "--help")
    assert code == 0 and f"Example:  owt launch {command} " in said
    code, said = owt("launch", command, *place, "--dry-run", "--", *train)
    assert code == 0 and said.endswith("owt train D --run-dir r\n"), said
    assert command in ("elastic", "supervise") or "-np 2" in said
    assert owt("launch", command, "--max-restarts", "-1", *place, "--", *train)[0] == 2
    assert owt("launch", command, *place)[0] == 2
    if command in ("hosts", "mpirun", "elastic"):
        where = ["--hosts", tmp_path / "hosts", "--interface", "lo; touch x"]
        code, said = owt("launch", command, *where, "--", *train)
        assert code == 2 and "--interface lo; touch x; wanted one of" in said and "lo" in said
    if command in ("mpirun", "elastic"):
        code, said = owt("launch", command, "--ranks", 2, "--hosts", tmp_path / "hosts", "--", *train)
        assert code == 2 and "one of them" in said


def test_a_box_without_gpus_gets_two_ranks(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert "-np 2 -H localhost:2" in owt("launch", "local", "--dry-run", "--", "D", "--run-dir", "r")[1]


@pytest.mark.parametrize(
    ("script", "command"),
    [
        (["horovodrun"], "local"),
        (["horovodrun", "--interface", "lo", "--hosts=h"], "hosts"),
        (["mpirun", "--hosts", "h"], "mpirun"),
        (["elastic"], "elastic"),
        (["supervise"], "supervise"),
    ],
)
def test_the_scripts_in_launch_are_owt_launch(script, command, tmp_path):
    (tmp_path / "owt").write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    (tmp_path / "owt").chmod(0o755)
    words = [*script[1:], "--", "my data", "--hosts"]
    done = subprocess.run(
        [LAUNCH / script[0], *words],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stdout.splitlines() == ["launch", command, *words], done.stderr


def test_horovodruns_ssh_is_not_given_a_folder_that_its_shell_would_misread():
    check_folder_for_ssh("/home/me/runs-1")
    with pytest.raises(ConfigError, match="owt launch mpirun"):
        check_folder_for_ssh("/home/me/$(touch x)")


def test_an_elastic_job_that_could_never_start_is_refused():
    with pytest.raises(ConfigError, match="--min-ranks 4 with at most 2 ranks"):
        ElasticJob(["D"], interface="lo", slots=2, min_ranks=4)


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


def test_horovodrun_started_by_us_writes_nothing_to_a_home(monkeypatch):
    """It keeps its ssh checks there, and ends where it cannot."""
    seen = []
    monkeypatch.setattr(horovod_launch, "_run_static", lambda args: seen.append(args.disable_cache))
    for restored, name in ((sys, "argv"), (remote, "SSH_COMMAND_PREFIX")):
        monkeypatch.setattr(restored, name, getattr(restored, name))
    monkeypatch.setattr(HostDiscoveryScript, "_execute_discovery_script", None)
    horovodrun.run(["--gloo", "-np", "1", "true"])
    assert seen == [True]


def test_the_hosts_of_an_elastic_job_are_read_without_another_python(tmp_path, monkeypatch):
    """And an unreadable file is an error of the moment, which Horovod's driver asks again after."""
    monkeypatch.setattr(HostDiscoveryScript, "_execute_discovery_script", None)  # restored afterwards
    discover_without_python()
    file = tmp_path / "a file"
    file.write_text("n1:2\nn2 slots=1\n")
    script = HostDiscoveryScript(shlex.join(["sh", str(DISCOVER_HOSTS), str(file)]), None)
    assert script.find_available_hosts_and_slots() == {"n1": 2, "n2": 1}
    file.unlink()
    with pytest.raises(subprocess.CalledProcessError):
        script.find_available_hosts_and_slots()


def test_a_variable_that_a_shell_would_not_take_stays_here_and_the_others_arrive_whole():
    """The command line as Horovod makes it, run by a shell as on another host."""
    values = {"LINES": "one\ntwo $HOME", "QUOTES": "it's `x`", "BYTES": "\udcff\udcfe", "a.b": "dotted"}
    env = {
        "PATH": os.environ["PATH"],
        "BASH_FUNC_ml%%": "() {  :\n}",
        "Program(x86)": "1",
        "a b": "2",
        **values,
    }
    drop_invalid_names(env)
    assert set(env) == {"PATH", *values}
    slot = SlotInfo("n1", 0, 0, 0, 1, 1, 1)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    command = _slot_info_to_command_fn(shlex.join([sys.executable, "-c", code]), env)(slot)
    arrived = json.loads(subprocess.check_output(["sh", "-c", command], env={}, timeout=20))
    assert {name: arrived[name] for name in values} == values
