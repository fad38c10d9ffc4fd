"""How much a cache may take: never the last of a disk, of the host's memory, or of a job's limit."""

import os
from types import SimpleNamespace

import psutil
import pytest

from horovod_owt import cgroups
from horovod_owt.data.room import room_in

GB = 10**9


@pytest.fixture
def host(monkeypatch, tmp_path):
    """100 GB of disk, 60 free; 50 GB of memory, 40 available; no limits."""
    disk = os.statvfs_result((1000, 1000, 10**8, 6 * 10**7, 6 * 10**7, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=50 * GB, available=40 * GB))
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/slurm/job\n")
    (tmp_path / "slurm" / "job").mkdir(parents=True)
    return tmp_path


def limit(group, most, used, files):
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 0\n")


def test_a_tenth_of_a_disk_is_spared(host):
    assert room_in(host, memory=False) == 50 * GB  # whatever the memory
    assert room_in(host, memory=True) == 35 * GB


def test_of_a_large_disk_10_gb_are_spared(host, monkeypatch):
    disk = os.statvfs_result((1000, 1000, 10**9, 6 * 10**7, 6 * 10**7, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert room_in(host, memory=False) == 50 * GB


def test_the_least_that_a_group_has_left_counts(host):
    limit(host / "slurm" / "job", 20 * GB, 10 * GB, 4 * GB)
    assert room_in(host, memory=True) == 12 * GB
    assert room_in(host, memory=False) == 50 * GB
    limit(host / "slurm", 10 * GB, 8 * GB, 0)
    assert room_in(host, memory=True) == 1 * GB
    limit(host / "slurm", 10 * GB, 10 * GB, 0)
    assert room_in(host, memory=True) == 0
    limit(host / "slurm", "max", 10 * GB, 0)
    assert room_in(host, memory=True) == 12 * GB


def test_groups_of_the_first_version_count_too(host):
    """Slurm on hosts of before 2020: without them the cache would fill memory until the job is killed."""
    own = (
        "9:memory:/slurm/job\n4:cpu,cpuacct:/slurm/job\n1:name=systemd:/slurm/job\n0::/system.slice/slurmd\n"
    )
    (host / "own").write_text(own)
    job = host / "memory" / "slurm" / "job"
    job.mkdir(parents=True)

    def limit_v1(group, most, used, files):
        (group / "memory.limit_in_bytes").write_text(f"{most}\n")
        (group / "memory.usage_in_bytes").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"cache 7\nactive_file 1\ntotal_active_file {files}\n")

    limit_v1(job, 20 * GB, 10 * GB, 4 * GB)
    limit_v1(job.parent, 2**63 - 4096, 40 * GB, 0)  # no limit
    assert room_in(host, memory=True) == 12 * GB
    assert room_in(host, memory=False) == 50 * GB
    (host / "own").write_text("9:memory:/docker/0123\n")  # as the host names it, from inside of the container
    limit_v1(host / "memory", 10 * GB, 8 * GB, 0)
    assert room_in(host, memory=True) == 1 * GB
