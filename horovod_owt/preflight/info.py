"""Information for a bug report: versions, Horovod, devices, host, limits, network. Runs no checks.

Anything missing or broken is a `fault` in its field; no failure may end the report. It contains no secrets:
of the environment only SHOWN_VARIABLES are read, and home folders are written as ~.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from horovod_owt.filesystem import free_space
from horovod_owt.topology import read_topology
from horovod_owt.versions import code_digest, installed_versions, package_versions

PROGRAM_S = 10.0  # for a program to print its version
LOAD_S = 120.0  # for torch and Horovod to load, from a slow file system
ALSO_PACKAGES = ("click", "jinja2", "nvidia-ml-py", "pillow", "psutil", "pyyaml", "safetensors", "scipy")
PROGRAMS = {
    "mpirun": ("mpirun", "--version"),
    "slurm": ("sinfo", "--version"),
    "compiler": ("c++", "--version"),
    "cmake": ("cmake", "--version"),
}
# Variables that affect how ranks start, compute or communicate. Listed by name, because prefixes would match
# secrets too, such as _HOROVOD_SECRET_KEY and the rendezvous address, which contains one.
SHOWN_VARIABLES = (
    *("CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
    *("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_PROC_BIND"),
    *("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "HOROVOD_CYCLE_TIME", "HOROVOD_ELASTIC"),
    *("HOROVOD_FUSION_THRESHOLD", "HOROVOD_GLOO_IFACE", "HOROVOD_GLOO_TIMEOUT_SECONDS"),
    *("HOROVOD_GPU_OPERATIONS", "HOROVOD_HIERARCHICAL_ALLREDUCE", "HOROVOD_OWT_LOOPBACK_SLOTS"),
    *("HOROVOD_OWT_SHARED_DEVICES", "HOROVOD_OWT_UNBOUND", "HOROVOD_RANK", "HOROVOD_SIZE"),
    *("HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_THREAD_AFFINITY", "HOROVOD_TIMELINE"),
    *("NCCL_ALGO", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_P2P_DISABLE", "NCCL_PROTO"),
    *("NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_NET_GDR_LEVEL"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_btl", "OMPI_MCA_btl_tcp_if_include"),
    *("OMPI_MCA_pml", "PRTE_MCA_prte_if_include", "UCX_NET_DEVICES", "UCX_TLS", "FI_PROVIDER"),
    *("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"),
    *("SLURM_MPI_TYPE", "SLURM_NTASKS", "SLURM_RESTART_COUNT", "SLURM_STEP_NUM_TASKS"),
    *("LANG", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV"),
    *("MALLOC_ARENA_MAX", "THP_MEM_ALLOC_ENABLE", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NUM_THREADS"),
)
LIMITS = {
    "open_files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked_bytes": resource.RLIMIT_MEMLOCK,
    "stack_bytes": resource.RLIMIT_STACK,
    "address_space_bytes": resource.RLIMIT_AS,
    "core_bytes": resource.RLIMIT_CORE,
}
CGROUP_FILES = ("memory.max", "cpu.max", "pids.max", "cpuset.cpus.effective")
INFINIBAND = Path("/sys/class/infiniband")


def information(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Versions, horovod, devices, host, limits and network of this process and its host."""
    loaded = _loaded()
    found = {
        "versions": _guarded(lambda: _versions(loaded.get("torch", {}))),
        "horovod": loaded["horovod"],
        "devices": {"gpus": _guarded(_gpus), "cpu": _guarded(_cpu)},
        "host": _guarded(lambda: _host(env)),
        "limits": _guarded(_limits),
        "network": _guarded(_network),
    }
    return _without_homes(found, env)


def _guarded(look: Callable[[], Any]) -> Any:
    """What `look` returns, or its error: the report must not fail on a broken host."""
    try:
        return look()
    except Exception as error:
        return {"fault": _fault(error)}


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _versions(torch: dict[str, Any]) -> dict[str, Any]:
    if "fault" in torch:
        torch = {"torch cannot be loaded": torch["fault"]}
    return {
        **installed_versions(),
        **package_versions(ALSO_PACKAGES),
        "code": code_digest(),
        **torch,
        **{name: _told(argv) for name, argv in PROGRAMS.items()},
        "libc": " ".join(platform.libc_ver()),
    }


def _told(argv: tuple[str, ...]) -> str:
    """The first line that a program prints."""
    if not shutil.which(argv[0]):
        return "not on PATH"
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROGRAM_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _fault(error)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else f"exit code {done.returncode}"


def _loaded() -> dict[str, dict[str, Any]]:
    """The output of `libraries`, run in another process, which broken libraries may crash.

    It searches for modules where this process does, but not in the current folder, which may have a
    random.py.
    """
    path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    code = f"import sys; sys.path[:] = {path!r}; from horovod_owt.preflight.libraries import main; main()"
    command = [sys.executable, "-I", "-c", code]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LOAD_S,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        fault = f"torch and Horovod did not load within {LOAD_S:.0f} s"
    except OSError as error:
        fault = _fault(error)
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines()[-1:]
        fault = f"loading torch and Horovod ended with exit code {done.returncode}: {' '.join(said)}"
    return {"torch": {"fault": fault}, "horovod": {"fault": fault}}


def _gpus() -> list[dict[str, Any]]:
    from horovod_owt.parallel.gpus import list_gpus

    return [asdict(gpu) for gpu in list_gpus()]


def _cpu() -> dict[str, Any]:
    from horovod_owt.parallel.cores import cpu_list

    names = re.findall(
        r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
    )
    memory = re.search(
        r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE
    )
    return {
        "name": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "usable_cores": cpu_list(os.sched_getaffinity(0)),
        "memory_bytes": int(memory[1]) << 10 if memory else None,
    }


def _host(env: Mapping[str, str]) -> dict[str, Any]:
    topology = read_topology(env)
    return {
        "name": platform.node(),
        "system": _system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "container": _container(env),
        "python": sys.executable,
        "package": str(Path(__file__).parents[1]),
        "launcher": str(topology.launcher),
        "rank": topology.rank,
        "world_size": topology.world_size,
        "environment": {name: env[name] for name in SHOWN_VARIABLES if name in env},
    }


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return platform.system()


def _container(env: Mapping[str, str]) -> str:
    """The kind of container, by the file that it creates; empty outside of one."""
    marks = {"docker": "/.dockerenv", "podman": "/run/.containerenv", "apptainer": "/.singularity.d"}
    return next((kind for kind, mark in marks.items() if os.path.exists(mark)), env.get("container", ""))


def _limits() -> dict[str, Any]:
    soft = {name: resource.getrlimit(limit)[0] for name, limit in LIMITS.items()}
    return {
        **{name: "unlimited" if limit == resource.RLIM_INFINITY else limit for name, limit in soft.items()},
        "cgroup": _cgroup(),
        "free_bytes": {place: _free(place) for place in ("/dev/shm", "/tmp", os.getcwd())},
    }


def _free(place: str) -> int | None:
    try:
        return free_space(Path(place))[0]
    except OSError:
        return None


def _cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> dict[str, str]:
    """This process's limits under cgroups v2: for each name, the nearest group that sets it."""
    try:
        groups = [line[3:] for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::")]
    except OSError:
        return {}
    folder = root / groups[0].lstrip("/") if groups else root
    found: dict[str, str] = {}
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            break
        for name in CGROUP_FILES:
            if (group / name).is_file() and name not in found:
                found[name] = (group / name).read_text(encoding="utf-8").strip()
    return found


def _network() -> dict[str, Any]:
    from horovod_owt.parallel.interfaces import SYSFS_NET, addresses_of, link

    interfaces = [
        {"name": path.name, "addresses": addresses_of(path.name), **link(path.name)}
        for path in sorted(SYSFS_NET.iterdir())
        if path.is_dir()
    ]
    return {
        "interfaces": interfaces,
        "infiniband": sorted(os.listdir(INFINIBAND)) if INFINIBAND.is_dir() else [],
    }


def _without_homes(found: Any, env: Mapping[str, str]) -> Any:
    """`found` with home folders as ~, because they contain user names."""
    if isinstance(found, dict):
        return {key: _without_homes(value, env) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_without_homes(value, env) for value in found]
    if not isinstance(found, str):
        return found
    home = env.get("HOME", "").rstrip("/")
    if home:
        found = re.sub(rf"{re.escape(home)}(?=[/:;,\s'\"]|$)", "~", found)
    return re.sub(r"/(?:home|Users|users)/[^/:;,\s'\"]+", "~", found)
