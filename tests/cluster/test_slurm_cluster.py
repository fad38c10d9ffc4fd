"""The test cluster itself: it leaves nothing, and does not mind another one."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from slurm_cluster import wait_for

PROGRAM = """
import signal, slurm_cluster
with slurm_cluster.cluster() as cluster:
    print(cluster.folder, flush=True)
    signal.pause()
"""


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that a cluster in `folder` has started: each got its slurm.conf, or has its name in its words."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_behind_however_its_owner_ends(slurm, number):
    """Beside a second one, whose hosts have the same names and addresses."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        folder = Path(owner.stdout.readline().strip())
        family = psutil.Process(owner.pid).children(recursive=True)
        assert len(processes_of(folder)) >= 4 and slurm.states() == ["idle"] * 3
        owner.send_signal(number)
        owner.wait(timeout=30)
    wait_for(lambda: not processes_of(folder) and not psutil.wait_procs(family, timeout=0)[1], 20)
    assert folder.exists() == (number == signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)  # the one thing that a killed owner cannot take along
    assert slurm.states() == ["idle"] * 3
