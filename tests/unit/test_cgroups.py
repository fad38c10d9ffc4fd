"""What a container allows its processes, as the files of both versions of cgroups say."""

import os

import pytest

from horovod_owt import cgroups
from horovod_owt.cgroups import cpu_quota, within_quota
from horovod_owt.data.workers import usable_cores
from horovod_owt.parallel import cores
from horovod_owt.parallel.device import CPU
from horovod_owt.topology import Launcher, Topology


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/pod/container\n")
    (tmp_path / "pod" / "container").mkdir(parents=True)
    return tmp_path / "pod" / "container"


def test_the_least_quota_of_the_groups_counts(group):
    assert cpu_quota() is None
    (group / "cpu.max").write_text("max 100000\n")
    assert cpu_quota() is None and within_quota(64) == 64
    (group.parent / "cpu.max").write_text("450000 100000\n")
    assert cpu_quota() == 4.5 and within_quota(64) == 4 and within_quota(64, ranks=2) == 2
    (group / "cpu.max").write_text("50000 100000\n")
    assert cpu_quota() == 0.5 and within_quota(64) == 1


def test_quotas_of_the_first_version_count_too(group, tmp_path):
    (tmp_path / "own").write_text("4:cpu,cpuacct:/docker/0123\n9:memory:/docker/0123\n")
    (tmp_path / "cpu").mkdir()
    for quota, wanted in (("-1", None), ("200000", 2.0)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert cpu_quota() == wanted


def test_threads_and_workers_are_as_many_as_a_container_may_run(group, monkeypatch, tmp_path):
    """`docker run --cpus=4` on a host of 64 cores: 64 threads would be stopped for most of the time."""
    (group / "cpu.max").write_text("400000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "SYSFS", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() == 4
    rank = Topology(Launcher.GLOO, 0, 2, 0, 2, "host", unbound=True)
    assert cores.use_own_cores(rank, CPU) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # as asked for
    assert cores.use_own_cores(rank, CPU) == 7
