"""Ranks on this box or on hosts: the logic of launch/horovodrun and launch/mpirun."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from horovod_owt.errors import ConfigError, OwtError
from horovod_owt.launch.hosts import read_hosts
from horovod_owt.launch.supervisor import Supervisor, say
from horovod_owt.parallel.device import visible_gpus
from horovod_owt.parallel.interfaces import chosen_interface, interface_environment
from horovod_owt.runs.attempts import find_run_dir
from horovod_owt.topology import UNBOUND

# What mpirun is to carry to other hosts; horovodrun carries all of the environment.
CARRIED = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|THP_MEM_ALLOC_ENABLE"
    r"|(HOROVOD|CUDA|NCCL|OMP|DALI|TORCH|PYTORCH|UCX)_\w+"
)

EXAMPLES = """\
examples:
  launch/{launcher} -- DATA --run-dir runs/first
  launch/{launcher} --hosts HOSTS_FILE --preflight -- DATA --run-dir runs/first
  launch/{launcher} --hosts HOSTS_FILE --max-restarts 3 -- DATA --run-dir runs/first --parallel hybrid
"""


@dataclass(frozen=True)
class Start:
    """`owt train` with these words, on so many ranks of each host; without hosts, on this box."""

    train: Sequence[str]
    hosts: Mapping[str, int]
    interface: str

    @property
    def world_size(self) -> int:
        return sum(self.hosts.values())

    @property
    def on_this_box(self) -> bool:
        return self.interface == "lo"

    def argv(self, launcher: str, env: Mapping[str, str], *, preflight: bool = False) -> list[str]:
        """The command; with `preflight`, it looks at what the training would use in place of training."""
        words = {"horovodrun": self._horovodrun, "mpirun": self._mpirun}[launcher](env)
        owt = preflight_words(self.train) if preflight else ["train", *self.train]
        return [launcher, *words, "owt", *owt]

    def _horovodrun(self, env: Mapping[str, str]) -> list[str]:
        return [
            "--gloo",
            "-np",
            str(self.world_size),
            "-H",
            self._list(),
            "--network-interfaces",
            self.interface,
        ]

    def _mpirun(self, env: Mapping[str, str]) -> list[str]:
        """Cores are for the ranks to choose, by their devices: mpirun binds none."""
        carried = [word for name in sorted(env) if CARRIED.fullmatch(name) for word in ("-x", name)]
        return ["-np", str(self.world_size), "--host", self._list(), "--bind-to", "none", *carried]

    def _list(self) -> str:
        return ",".join(f"{host}:{slots}" for host, slots in self.hosts.items())

    def environment(self) -> dict[str, str]:
        """For launcher and ranks."""
        return {UNBOUND: "1", **({} if self.on_this_box else interface_environment(self.interface))}


def preflight_words(train: Sequence[str]) -> list[str]:
    """After `owt`: preflight of the data and the run folder in these words after `owt train`."""
    data, run_dir = train[0], find_run_dir(train)
    if data.startswith("-"):
        raise ConfigError(f"{data} before DATA", wanted="DATA first", fix="-- DATA --run-dir ...")
    return ["preflight", data, *(["--run-dir", str(run_dir)] if run_dir else [])]


def main(launcher: str, description: str) -> int:
    """The exit code of the job: outcome.json's where the run wrote one."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=EXAMPLES.format(launcher=launcher),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ranks", type=count, metavar="N", help="on this box (default: one for each GPU)")
    where.add_argument("--hosts", type=Path, metavar="FILE", help="lines HOST:SLOTS or HOST slots=SLOTS")
    parser.add_argument("--interface", metavar="NAME", help="default: the one that leads to the other hosts")
    parser.add_argument(
        "--max-restarts",
        type=restarts,
        default=0,
        metavar="N",
        help="after faults, from the last checkpoint (default: 0)",
    )
    parser.add_argument(
        "--preflight", action="store_true", help="do not train: check these ranks, hosts, DATA and run folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and leave")
    parser.add_argument("train", nargs="+", metavar="-- DATA", help="and options, as for `owt train`")
    args = parser.parse_args()
    try:
        hosts = read_hosts(args.hosts) if args.hosts else {"localhost": args.ranks or _one_for_each_gpu()}
        start = Start(args.train, hosts, chosen_interface(args.interface, list(hosts)))
        env = {**os.environ, **start.environment()}
        if launcher == "horovodrun" and not start.on_this_box:
            check_folder_for_ssh(os.getcwd())
        command = start.argv(launcher, env, preflight=args.preflight)
        if args.dry_run:
            print(shlex.join([*(f"{name}={value}" for name, value in start.environment().items()), *command]))
            return 0
        if not start.on_this_box:
            say(f"{start.world_size} ranks on {len(hosts)} hosts, by interface {start.interface}")
        if args.preflight:
            os.execvpe(command[0], command, env)
        os.environ.update(env)
        return Supervisor(command, max_restarts=args.max_restarts).run()
    except OwtError as error:
        say(str(error))
        return error.exit_code


def check_folder_for_ssh(folder: str) -> None:
    """horovodrun has a shell on each host enter the folder that it was started in, and quotes nothing."""
    if shlex.quote(folder) != folder:
        raise ConfigError(
            f"horovodrun in folder {folder!r}",
            wanted="a path that needs no quotes: a shell on each host is to enter it",
            fix="start it in another folder, with full paths, or take launch/mpirun",
        )


def count(word: str) -> int:
    """A number of ranks or seconds, for argparse."""
    number = int(word)
    if number < 1:
        raise ValueError(word)
    return number


def restarts(word: str) -> int:
    """A number that may be 0, for argparse."""
    return count(word) if word != "0" else 0


def _one_for_each_gpu() -> int:
    gpus = visible_gpus()
    if not gpus:
        raise ConfigError("no GPU here", wanted="how many ranks this box is to have", fix="--ranks N")
    return gpus
