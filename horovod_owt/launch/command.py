"""Start a job with horovodrun or mpirun: `owt launch local`, `hosts` and `mpirun`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horovod_owt.errors import ConfigError
from horovod_owt.launch.supervisor import Supervisor, say
from horovod_owt.parallel.device import visible_gpus
from horovod_owt.parallel.interfaces import chosen_interface, interface_environment
from horovod_owt.runs.attempts import find_run_dir
from horovod_owt.topology import UNBOUND, Launcher

# Variables that mpirun exports to other hosts; horovodrun exports the whole environment.
EXPORTED = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|THP_MEM_ALLOC_ENABLE"
    r"|(HOROVOD|CUDA|NCCL|OMP|DALI|TORCH|PYTORCH|UCX)_\w+"
)

HOROVODRUN = ("owt", "launch", "gloo", "--gloo")


@dataclass(frozen=True)
class Start:
    """A job to start: the arguments of `owt train`, and the number of ranks on each host."""

    launcher: Launcher  # GLOO or MPIRUN
    train: Sequence[str]
    hosts: Mapping[str, int]
    interface: str

    @property
    def world_size(self) -> int:
        return sum(self.hosts.values())

    @property
    def on_one_host(self) -> bool:
        return self.interface == "lo"

    def argv(self, env: Mapping[str, str], *, preflight: bool = False) -> list[str]:
        """The command line of the training; with `preflight`, of a preflight check of it."""
        launcher = self._mpirun(env) if self.launcher is Launcher.MPIRUN else self._horovodrun()
        owt = preflight_args(self.train) if preflight else ["train", *self.train]
        return [*launcher, "owt", *owt]

    def _horovodrun(self) -> list[str]:
        where = ["-np", str(self.world_size), "-H", self._list()]
        return [*HOROVODRUN, *where, "--network-interfaces", self.interface]

    def _mpirun(self, env: Mapping[str, str]) -> list[str]:
        """mpirun binds no cores: ranks choose theirs by their devices."""
        exported = [word for name in sorted(env) if EXPORTED.fullmatch(name) for word in ("-x", name)]
        where = ["-np", str(self.world_size), "--host", self._list()]
        return ["mpirun", *where, "--bind-to", "none", *exported]

    def _list(self) -> str:
        return ",".join(f"{host}:{slots}" for host, slots in self.hosts.items())

    def environment(self) -> dict[str, str]:
        """Variables for the launcher and the ranks."""
        return {UNBOUND: "1", **({} if self.on_one_host else interface_environment(self.interface))}


def preflight_args(train: Sequence[str]) -> list[str]:
    """The arguments of `owt` for a preflight of the data and run folder of a training."""
    data, run_dir = train[0], find_run_dir(train)
    if data.startswith("-"):
        raise ConfigError(f"{data} before DATA", wanted="DATA first", fix="-- DATA --run-dir ...")
    return ["preflight", data, *(["--run-dir", str(run_dir)] if run_dir else [])]


def run(
    launcher: Launcher,
    train: Sequence[str],
    hosts: Mapping[str, int],
    interface: str | None,
    *,
    max_restarts: int,
    preflight: bool,
    dry_run: bool,
) -> int:
    """Start the job; returns its exit code, from outcome.json if the run wrote one."""
    start = Start(launcher, train, hosts, chosen_interface(interface, list(hosts)))
    command = start.argv(os.environ | start.environment(), preflight=preflight)
    if launcher is Launcher.GLOO and not start.on_one_host:
        check_folder_for_ssh(os.getcwd())
    if dry_run:
        return show(command, start.environment())
    if not start.on_one_host:
        say(f"{start.world_size} ranks on {len(hosts)} hosts, interface {start.interface}")
    os.environ.update(start.environment())
    if preflight:
        os.execvp(command[0], command)
    return Supervisor(command, max_restarts=max_restarts).run()


def show(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Print the command as a shell command line."""
    print(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command]))
    return 0


def default_ranks() -> int:
    """The default number of ranks on this host: one per GPU, or two on CPU cores."""
    return visible_gpus() or min(2, len(os.sched_getaffinity(0)))


def check_folder_for_ssh(folder: str) -> None:
    """Refuse a folder whose name needs quotes: horovodrun passes it unquoted to a shell on each host."""
    if shlex.quote(folder) != folder:
        raise ConfigError(
            f"horovodrun in folder {folder!r}",
            wanted="a path that needs no shell quoting",
            fix="start it in another folder, with full paths, or use `owt launch mpirun`",
        )
