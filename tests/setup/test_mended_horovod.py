"""The installed Horovod, with real ranks: each fault that a patch mends, and every launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path
from sysconfig import get_config_var

import pytest
from set_up_support import LIMIT_S, installed, lanes, mpi, proof

NO_SUCH_HOST = "no-such-host.invalid"  # .invalid never resolves


@pytest.fixture
def on_a_host_whose_name_does_not_resolve() -> tuple[str, ...]:
    words = ("unshare", "--uts", "sh", "-c", f'hostname {NO_SUCH_HOST} && exec "$@"', "sh")
    if os.getuid() != 0 or subprocess.run([*words, "true"], capture_output=True).returncode != 0:
        pytest.skip("another host name needs root and unshare")
    return words


LATE = """
import os, sys, time
import torch, horovod.torch as hvd
hvd.init()
while hvd.rank() == 1 and not os.path.exists(sys.argv[1]):
    time.sleep(0.1)
hvd.allreduce(torch.ones(1), name="late")
print("summed", flush=True)
"""


def test_stall_inspector_names_the_missing_rank_under_gloo(ranks, tmp_path):
    job = ranks(2, LATE, str(tmp_path / "come"), HOROVOD_STALL_CHECK_TIME_SECONDS="2")
    said = ""
    for line in job.stdout:  # without the patch not a word, to the time limit
        said += line
        if "1: [allreduce.late]" in line:
            break
    assert "Missing ranks" in said and "1: [allreduce.late]" in said, said
    (tmp_path / "come").touch()
    rest = job.stdout.read()
    assert job.wait(20) == 0 and rest.count("summed") == 2


WAITS = """
import os, sys, time
import torch, horovod.torch as hvd
hvd.init()
if hvd.rank() == 1:
    time.sleep(2)
start, start_cpu = time.perf_counter(), time.thread_time()
hvd.allreduce(torch.ones(1), name="late")
waited, burnt = time.perf_counter() - start, time.thread_time() - start_cpu
if hvd.rank() == 0:
    print(f"waited {waited:.3f} burnt {burnt:.3f}", flush=True)
"""


def test_a_waiting_rank_sleeps(ranks):
    said = ranks(2, WAITS).stdout.read()
    waited, burnt = map(float, re.search(r"waited (\S+) burnt (\S+)", said).groups())
    assert waited > 1 and burnt < 0.1 * waited, said  # without the patch all of it is burnt


IDLE = """
import re, statistics, time
from pathlib import Path
import torch, horovod.torch as hvd

def switches():
    texts = [(task / "status").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(int(re.search(r"^voluntary_ctxt_switches:\\s+(\\d+)", text, re.M)[1]) for text in texts)

hvd.init()
hvd.barrier()
before = switches()
time.sleep(2)
woken = switches() - before
took = []
for turn in range(11):
    time.sleep(0.02)  # long enough for the thread to fall asleep again
    start = time.perf_counter()
    hvd.allreduce(torch.ones(1), name="one")
    took.append(time.perf_counter() - start)
if hvd.rank() == 0:
    print(f"woken {woken} took {statistics.median(took):.3f}", flush=True)
hvd.barrier()
"""


@pytest.mark.alone
def test_an_idle_thread_sleeps_until_there_is_work(ranks):
    said = ranks(2, IDLE, HOROVOD_IDLE_CYCLE_TIME="500").stdout.read()
    woken, took = map(float, re.search(r"woken (\S+) took (\S+)", said).groups())
    assert woken < 1500, said  # 400, most of them by Gloo; 5600 in cycles of 1 ms
    assert took < 0.2, said  # not at the end of its sleep, but at once


TWICE = """
import torch, horovod.torch as hvd
for _ in range(2):
    hvd.init()
    print("sum:", hvd.allreduce(torch.ones(1), op=hvd.Sum, name="one").item(), flush=True)
    hvd.shutdown()
"""


def test_horovod_starts_again_with_its_settings(ranks):
    """As in an elastic job that regroups; without the patch the second init is the process's end."""
    job = ranks(2, TWICE, HOROVOD_FUSION_THRESHOLD="0", HOROVOD_CYCLE_TIME="1")
    said = job.stdout.read()
    assert job.wait(20) == 0 and said.count("sum: 2.0") == 4, said


STARTS_OPERATIONS = """
import itertools, os
import torch, horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
hvd.init()
hvd.allreduce(torch.ones(1), name="both")
if hvd.rank() == 1:
    os._exit(0)
try:
    for number in itertools.count():
        hvd.allreduce_async_(torch.ones(1), name=str(number))
except HorovodInternalError:
    print("told", flush=True)
"""


def test_a_lost_rank_does_not_freeze_one_that_starts_an_operation(ranks):
    assert "told" in ranks(2, STARTS_OPERATIONS).stdout.read()


def test_stall_shutdown_ends_the_job_under_gloo(ranks, tmp_path):
    job = ranks(
        2,
        LATE,
        str(tmp_path / "never"),
        HOROVOD_STALL_CHECK_TIME_SECONDS="1",
        HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="3",
    )
    said = job.stdout.read()
    assert job.wait(20) not in (0, -15) and "shut" in said.lower(), said


TWO_OF_THREE = """
import torch, horovod.torch as hvd
ends = hvd.ProcessSet([0, 2])
hvd.init(process_sets=[ends])
if ends.included():
    print("sum of two:", hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=ends).item(), flush=True)
hvd.barrier()    # the first rank to leave would end Horovod for the others
"""


def test_process_sets_keep_to_the_interface_they_are_told(ranks, on_a_host_whose_name_does_not_resolve):
    """horovodrun names the interface (lo); unpatched, process sets ask for this host's name and crash."""
    job = ranks(3, TWO_OF_THREE, under=on_a_host_whose_name_does_not_resolve)
    said = job.stdout.read()
    assert job.wait(20) == 0, said
    assert said.count("sum of two: 2.0") == 2


def test_a_host_name_that_does_not_resolve_is_named(ranks, on_a_host_whose_name_does_not_resolve):
    program = "import horovod.torch as hvd; hvd.init()"
    job = ranks(
        1,
        program,
        under=on_a_host_whose_name_does_not_resolve,
        HOROVOD_CONTROLLER="gloo",
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )
    said = job.stdout.read()
    assert job.wait(20) != 0
    assert f"Unable to resolve {NO_SUCH_HOST}" in said and "Segmentation fault" not in said, said


def test_horovodrun_needs_no_distutils():
    program = "import sys; sys.modules['distutils'] = None; import horovod.runner.launch"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LIMIT_S)


def test_horovodrun_ends_with_the_workers_exit_code():
    """Of the first worker that failed; its last words are not followed by a traceback."""
    program = "import os, sys; rank = os.environ['HOROVOD_RANK']; sys.exit(75 if rank == '1' else 0)"
    argv = [Path(sys.executable).with_name("horovodrun"), "--gloo", "-np", "2", sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 75, done.stderr
    assert "Process name: 1\nExit code: 75" in done.stderr and "Traceback" not in done.stderr


ASKS_FOR_GLOO = """
import sys
sys.modules["torch"] = None
from horovod.common import util
print(util.gloo_built(), end=" ")
util.__file__ = sys.argv[1]
print(util.gloo_built(verbose=True))  # not what it has cached
"""


def test_horovodrun_asks_for_gloo_without_loading_torch(tmp_path):
    """Of this Horovod, and of one whose extension has none."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / f"mpi_lib_v2{get_config_var('EXT_SUFFIX')}").write_bytes(b"MPIContext")
    argv = [sys.executable, "-c", ASKS_FOR_GLOO, tmp_path / "common" / "util.py"]
    assert subprocess.check_output(argv, text=True, timeout=LIMIT_S).split() == ["True", "False"]


@pytest.fixture
def built_mpi() -> mpi.Mpi:
    import horovod.torch as hvd

    if not hvd.mpi_built():
        pytest.skip("this Horovod was built without MPI")
    here = installed()
    return mpi.kept(here) if mpi.kept(here).there else mpi.installed_from_pip(here)


@pytest.fixture
def proofs_cache(monkeypatch, tmp_path):
    """Where the proof logs: not over the logs of a setup."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "horovod_owt").mkdir()


def two_ranks(name: str, chosen: mpi.Mpi) -> dict:
    environ = {
        **installed().child_env(),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return proof.prove_one(installed(), name, proof.launchers(chosen)[name], environ, chosen)


def test_horovodrun_gloo_starts_ranks(proofs_cache):
    assert two_ranks("horovodrun --gloo", mpi.NO_MPI)["controller"] == "gloo"


def test_horovodrun_mpi_starts_ranks(proofs_cache, built_mpi):
    facts = two_ranks("horovodrun --mpi", built_mpi)
    assert facts["controller"] == "mpi"
    assert len(facts["libmpi"]) == 1  # one MPI in the process, pip's from this very environment


@pytest.mark.parametrize(
    "said, known_as",
    [
        ("mpirun (Open MPI) 5.0.11", "OpenMPI"),
        ("HYDRA build details:\n    Version:        4.2.1\n    CC:       gcc", "MPICH"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 20260101", "IntelMPI"),
        ("somebody's mpirun 1.0", "Unknown"),
    ],
)
def test_horovodrun_mpi_recognizes_an_mpi_by_what_its_mpirun_says(tmp_path, said, known_as):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    mpirun.chmod(0o755)
    ask = (
        "import sys; from horovod.runner.mpi_run import _get_mpi_implementation as implementation;"
        "print(implementation({'PATH': sys.argv[1] + ':/usr/bin:/bin'}))"
    )
    here = installed()
    done = subprocess.run(
        [here.python, "-c", ask, tmp_path],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=here.child_env(),
    )
    assert done.stdout.strip() == known_as, done.stderr


def test_mpirun_starts_ranks_and_mpi4py_sees_them(proofs_cache, built_mpi):
    facts = two_ranks("mpirun", built_mpi)
    assert (facts["controller"], facts["mpi4py_size"]) == ("mpi", 2)


def test_the_proof_needs_no_home_to_write_to():
    """horovodrun would write its cache there, and end where it cannot."""
    ways = proof.launchers(mpi.Mpi("pip", "mpicc", "mpirun (Open MPI) 5.0.11"))
    assert [name for name, words in ways.items() if "--disable-cache" in words] == [
        "horovodrun --gloo",
        "horovodrun --mpi",
    ]


@pytest.mark.parametrize(
    "rank, fault",
    [
        ({}, None),
        ({"sum_is_right": False}, "wrong sum over the ranks"),
        ({"size": 1}, "wrong sum over the ranks"),
        ({"controller": "mpi"}, "ran under mpi, wanted gloo"),
        ({"mpi4py_size": 1}, "mpi4py sees 1 rank"),
        ({"mpi4py_size": 0}, "mpi4py sees 0 rank"),
        ({"libmpi": ["/a/libmpi.so.40", "/b/libmpi.so.40"]}, "two MPI libraries"),
        ({"libmpi": ["/another/venv/lib/libmpi.so.40"]}, "Horovod loaded /another/venv"),
        ({"rank": 0}, r"ranks \[0, 0\] reported"),
    ],
)
def test_the_proof_does_not_take_a_wrong_answer(rank, fault, here):
    sound = {"size": 2, "sum_is_right": True, "controller": "gloo", "mpi4py_size": None, "libmpi": []}
    answers = [{**sound, "rank": 0}, {**sound, "rank": 1, **rank}]
    said = proof.fault_in(answers, "gloo", here, mpi.Mpi("pip", "mpicc", "mpirun (Open MPI) 5.0.11"))
    if fault is None:
        assert said is None
    else:
        assert re.search(fault, said)


def test_the_wheel_says_that_it_is_the_mended_one():
    from importlib.metadata import version

    assert "+owt." in version("horovod"), "stock Horovod here: run launch/setup"
    assert lanes.LANES and Path(sys.prefix, "bin", "horovodrun").exists()
