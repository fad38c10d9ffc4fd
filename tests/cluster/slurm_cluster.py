"""A real Slurm of several hosts on this machine: munge, slurmctld, and a slurmd and an sshd on each node.

Every host is a set of namespaces: network, host name, processes, mounts. The bridge that joins them lives in
the login host's network, so that no name, address or port of it can collide with this machine's or with
another cluster's. A host is one process tree below one init; when that is killed, the kernel ends the rest,
and networks go with their last process. If this process dies, however it dies, its hosts die with it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parents[1]))  # for programs that import this module alone

import debian_packages  # noqa: E402
from debian_packages import SYSTEM_PATH, Unfit, find  # noqa: E402

# what the cluster is made of: a program, or a pattern of files, and the package that brings it
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ip": "iproute2",
    "unshare": "util-linux",
    # for srun --mpi=pmix: Slurm's plugin opens libpmix.so, without a number. The Open MPI 5 that launch/setup
    # takes from pip brings PMIx 5 for its ranks, which speaks with the PMIx 4 of this package.
    "/usr/lib/*/pmix2/lib/libpmix.so": "libpmix-dev",
}
NODES = ("n1", "n2", "n3")
ADDRESSES = {"login": "198.18.0.1", "n1": "198.18.0.11", "n2": "198.18.0.12", "n3": "198.18.0.13"}
PR_SET_PDEATHSIG = 1  # prctl(2)

# The first process of a host. It waits for its network, then becomes the parent of its daemons: as PID 1 of
# its namespace it reaps what they leave. /run is its own, as sshd wants a folder there; so is /dev/shm.
HOST = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
ip link set lo up
read -r go
shift 2
for daemon; do $daemon & done
while wait; do read -r go; done
"""


def install() -> None:
    """Install what is missing with apt; raises Unfit where that is not for us to do."""
    if os.geteuid() != 0:
        raise Unfit("namespaces and slurmd need root")
    debian_packages.install(PACKAGES)


class Host:
    """One machine of the cluster, for as long as its first process lives."""

    def __init__(self, name: str, folder: Path, daemons: list[str], cores: set[int]) -> None:
        self.name = name
        with (folder / f"{name}.out").open("ab") as said:
            self._unshare = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
                + ["sh", "-c", HOST, "sh", name, str(folder), *daemons],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": SYSTEM_PATH, "SLURM_CONF": str(folder / "slurm.conf")},
                start_new_session=True,  # Ctrl-C is for pytest, whose teardown ends us
                preexec_fn=lambda: be_host_on(cores),
            )
        self.pid = wait_for(self._first_process, 10)
        self._first = psutil.Process(self.pid)

    def _first_process(self) -> int:
        """Its number on this machine, once it is in its new namespaces."""
        if self._unshare.poll() is not None:
            raise Unfit(f"host {self.name} did not start: see unshare(1)")
        children = psutil.Process(self._unshare.pid).children()
        here = os.readlink("/proc/self/ns/net")
        return children[0].pid if children and os.readlink(f"/proc/{children[0].pid}/ns/net") != here else 0

    def enter(self, *command: str) -> list[str]:
        """The argv that runs a command on this host."""
        return ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", "--pid", "--wd=.", *command]

    def start_daemons(self) -> None:
        """Its network is there now."""
        self._unshare.stdin.write(b"go\n")
        self._unshare.stdin.flush()

    def kill(self) -> None:
        """As if its power were cut: the kernel ends its processes, and its network goes with the last one."""
        self._unshare.kill()
        self._unshare.stdin.close()

    def wait_until_gone(self) -> None:
        """Its first process ends when the kernel has ended all others; a zombie has, whoever reaps it."""
        self._unshare.wait()
        try:
            self._first.wait(60)
        except psutil.TimeoutExpired:
            family = [self._first, *self._first.children(recursive=True)]
            left = [(process.pid, process.status(), process.cmdline()) for process in family]
            raise TimeoutError(f"host {self.name} was killed 60 s ago and is still there: {left}") from None


def be_host_on(cores: set[int]) -> None:
    """What is started now dies with this process, and computes on these cores only."""
    os.sched_setaffinity(0, cores)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def cores_of(name: str) -> set[int]:
    """Every other one, so that hosts side by side share no core where the machine has enough."""
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[NODES.index(name) % 2 :: 2] or cores)


class Cluster:
    """A login host with munged and slurmctld, and three nodes; commands run on whichever is asked."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self._path = folder, path
        self._write_files()
        slurmctld = f"{find('slurmctld')} -D -i"
        munge = " ".join(f"--{name}={folder}/munge.{name[:3]}" for name in ("socket", "log-file", "pid-file"))
        munged = (
            f"{find('munged')} -F --force {munge} --key-file={folder}/munge.key --seed-file={folder}/seed"
        )
        self.login = Host("login", folder, [munged, slurmctld], os.sched_getaffinity(0))
        self.hosts = {"login": self.login}

    def start(self) -> None:
        """Ready when each node is idle."""
        self._ip("link", "add", "br0", "type", "bridge")
        self._ip("addr", "add", f"{ADDRESSES['login']}/24", "dev", "br0")
        self._ip("link", "set", "br0", "up")
        self.login.start_daemons()
        for name in NODES:
            self.power_on(name)
        wait_for(lambda: self.states().count("idle") == len(NODES), 30)

    def power_on(self, name: str) -> None:
        daemons = [f"{find('slurmd')} -D -N {name}", f"{find('sshd')} -D -f {self.folder}/sshd_config"]
        host = self.hosts[name] = Host(name, self.folder, daemons, cores_of(name))
        self._ip("link", "add", f"to-{name}", "type", "veth", "peer", "eth0", "netns", str(host.pid))
        self._ip("link", "set", f"to-{name}", "master", "br0", "up")
        for words in (["addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            do(host.enter("ip", *words))
        host.start_daemons()

    def stop(self) -> None:
        for host in self.hosts.values():
            host.kill()
        for host in self.hosts.values():
            host.wait_until_gone()

    def power_off(self, name: str) -> None:
        self._ip("link", "delete", f"to-{name}")  # or its kernel would take leave of everybody
        self.hosts[name].kill()
        self.hosts[name].wait_until_gone()

    def run(self, *command: str | Path, host: str = "login", limit_s: float = 60, **options) -> str:
        """What a command says on stdout; fails with what it said on stderr."""
        argv = self.hosts[host].enter(*map(str, command))
        return do(argv, timeout=limit_s, env=options.pop("env", self.environment()), **options)

    def environment(self) -> dict[str, str]:
        """Of a user who has logged in."""
        drop = ("HOROVOD_", "OMPI_COMM", "PMI", "SLURM_", "SBATCH_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        return clean | {
            "PATH": self._path,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def states(self) -> list[str]:
        """Of the nodes; empty while slurmctld does not answer."""
        try:
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split()
        except subprocess.SubprocessError:
            return []

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm says of a job, word by word."""
        said = self.run("scontrol", "-o", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def _ip(self, *words: str) -> None:
        """On the login host's network, but among this machine's processes: `netns` wants their numbers."""
        do(["nsenter", "-t", str(self.login.pid), "--net", "ip", *words])

    def _write_files(self) -> None:
        folder = self.folder
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
        )
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        for name in ("state", *NODES):
            (folder / name).mkdir()
        (folder / "plugstack.conf").touch()
        (folder / "gres.conf").write_text(GRES_CONF)
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, nodes=node_lines()))
        key = folder / "ssh_key"
        do(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))


def node_lines() -> str:
    """More CPUs than this machine may have: Slurm only counts them."""
    return "\n".join(
        f"NodeName={name} NodeAddr={ADDRESSES[name]} CPUs=4 RealMemory=4000 Gres=gpu:2" for name in NODES
    )


# CPUs=4 with config_overrides: two ranks a node, on however many cores this machine has. TmpFS: or the nodes'
# pmix folders collide. cred_expire (120 s by default) and the scheduler's intervals (30 s): so long a job
# that is requeued waits before it starts again.
SLURM_CONF = """\
ClusterName=owt
SlurmctldHost=login({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={{folder}}/munge.soc,cred_expire=5
StateSaveLocation={{folder}}/state
SlurmctldPidFile={{folder}}/slurmctld.pid
SlurmctldLogFile={{folder}}/slurmctld.log
SlurmdSpoolDir={{folder}}/%n/spool
SlurmdPidFile={{folder}}/%n/slurmd.pid
SlurmdLogFile={{folder}}/%n/slurmd.log
TmpFS={{folder}}/%n
PlugStackConfig={{folder}}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdTimeout=6
MessageTimeout=5
KillWait=5
OverTimeLimit=0
ReturnToService=2
MinJobAge=300
GresTypes=gpu
{{nodes}}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
""".format(address=ADDRESSES["login"])

# Slurm counts them and sets CUDA_VISIBLE_DEVICES, for which it takes any two device files.
GRES_CONF = "NodeName=n[1-3] Name=gpu File=/dev/null,/dev/zero Flags=nvidia_gpu_env\n"

SSHD_CONFIG = """\
HostKey {folder}/ssh_key
AuthorizedKeysFile {folder}/ssh_key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""

SSH_CONFIG = """\
IdentityFile {folder}/ssh_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@contextmanager
def cluster(path: str = SYSTEM_PATH):
    """The cluster, for as long as the block lasts; `path` is its users' PATH. Nothing of it stays behind."""
    folder = Path(tempfile.mkdtemp(prefix="owt-slurm-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        slurm = Cluster(folder, path)
        stack.callback(slurm.stop)
        slurm.start()
        yield slurm


def do(argv: list[str], **options) -> str:
    options = {"timeout": 30, **options}
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, argv, done.stdout, done.stderr)
    return done.stdout


def wait_for(condition, limit_s: float):
    """Poll until `condition` gives something true, and return that."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"waited {limit_s} s in vain")
