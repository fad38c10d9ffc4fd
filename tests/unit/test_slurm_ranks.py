"""How the batch process of a job starts its ranks."""

import os
import subprocess
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner
from job_scripts import rendered, words_that_arrive

from horovod_owt.cli import cli
from horovod_owt.errors import ConfigError, RunError
from horovod_owt.launch.hosts import read_hosts
from horovod_owt.parallel import interfaces
from horovod_owt.slurm import batch, client, nodes
from horovod_owt.slurm.allocation import Allocation, node_list, read_allocation
from horovod_owt.slurm.batch import owt_args
from horovod_owt.slurm.client import start_ranks
from horovod_owt.slurm.container import Container
from horovod_owt.slurm.gloo_rank import horovod_environment
from horovod_owt.slurm.launchers import choose_launcher, ranks_argv
from horovod_owt.topology import Launcher, expand_counts

ALLOCATION = Allocation("7", ("n1", "n2"), ranks_per_node=2, cpus_per_node=8, restarts=0)


@pytest.mark.parametrize(("asked", "least"), [(0, 2), (3, 3)])
def test_half_of_an_elastic_jobs_ranks_are_enough_unless_more_are_asked_for(capfd, asked, least):
    batch.ElasticRanks(ALLOCATION, asked, "eth0")
    assert f"elastic, at least {least} ranks" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="--min-ranks 5 in a job of 4 ranks"):
        batch.ElasticRanks(ALLOCATION, 5, "eth0")
    batch.ElasticRanks(replace(ALLOCATION, hosts=("n1",), ranks_per_node=5), 0, "eth0")
    assert "elastic, at least 3 ranks" in capfd.readouterr().err


def test_the_file_of_nodes_follows_slurm_while_it_answers(monkeypatch):
    """Away for a moment, as in a restart of slurmctld, it takes no node."""
    answers, said = iter([["n1", "n2"], RunError("slurmctld is away"), [], ["n2"]]), []

    def answer(job_id: str) -> list[str]:
        said_now = next(answers, [])
        if isinstance(said_now, RunError):
            raise said_now
        return said_now

    monkeypatch.setattr(nodes, "POLL_S", 0.05)
    monkeypatch.setattr(nodes, "LEAVE_S", 0.05)
    monkeypatch.setattr(nodes, "nodes_of", answer)
    with nodes.nodes_file(ALLOCATION, said.append) as file:
        assert read_hosts(file) == {"n1": 2, "n2": 2}
        end = time.monotonic() + 10
        while not said and time.monotonic() < end:
            time.sleep(0.01)
        assert said == ["lost nodes n1; remaining: n2"]
        time.sleep(0.2)
        assert read_hosts(file) == {"n2": 2}
    assert not file.exists()


@pytest.mark.parametrize(("gpus", "warned"), [("4", True), ("2", False), ("", False)])
def test_gpus_without_a_rank_are_warned_of(monkeypatch, capfd, gpus, warned):
    """SLURM_NTASKS_PER_NODE may be left from the shell that submitted the job."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
    batch.log_start(ALLOCATION, Launcher.GLOO, "set by --launcher", "eth0")
    assert (
        "WARNING 2 of the 4 GPUs on a node in use; fix: --ntasks-per-node 4" in capfd.readouterr().err
    ) == warned


@pytest.mark.parametrize("size", ["SLURM_HET_SIZE", "SLURM_PACK_SIZE"])
def test_the_batch_process_of_a_heterogeneous_job_is_refused(size):
    with pytest.raises(ConfigError, match="a heterogeneous job of 2 components; wanted one component"):
        node_list({"SLURM_JOB_NODELIST": "n1", size: "2"})
    assert node_list({"SLURM_JOB_NODELIST": "n1", size: "1"}) == "n1"


def test_ranks_get_the_batch_processs_environment_whatever_sbatch_exported(monkeypatch):
    monkeypatch.setenv("SLURM_EXPORT_ENV", "NONE")
    monkeypatch.setenv("SRUN_EXPORT_ENV", "NIL")
    monkeypatch.setenv("SLURM_NTASKS_PER_GPU", "1")  # srun ends: "mutually exclusive" with --ntasks-per-node
    monkeypatch.setenv("OF_THE_JOB", "a")
    unset = "$SLURM_EXPORT_ENV$SRUN_EXPORT_ENV$SLURM_NTASKS_PER_GPU"
    check = f'test "$OF_THE_JOB$OF_THE_LAUNCHER/{unset}" = ab/'
    assert start_ranks(["sh", "-c", check], {"OF_THE_LAUNCHER": "b"}).wait(20) == 0


@pytest.mark.parametrize(("inherited", "left"), [("SLURM_MEM_PER_CPU", ""), ("NONE", "200")])
def test_memory_of_the_job_that_submitted_this_one_does_not_reach_srun(monkeypatch, inherited, left):
    """srun ends with two: "mutually exclusive"."""
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "200")
    monkeypatch.setenv(inherited, "100")
    check = f'test "$SLURM_MEM_PER_NODE$SLURM_MEM_PER_CPU" = "{left}"'
    assert start_ranks(["sh", "-c", check], {}).wait(20) == 0


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "8(x2)"}


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({}, 1),
        ({"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100"}, 1),  # not 100
        ({"SLURM_GPUS_PER_NODE": "a100:2,v100:2", "SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_NTASKS": "6"}, 3),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "4"}, 2),  # sbatch -n4 --ntasks-per-node=4: at most
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "8"}, 2),  # what the nodes may have
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4", "SLURM_GPUS_ON_NODE": "8"}, 2),
    ],
)
def test_ranks_of_a_node_are_its_tasks_or_else_its_gpus(env, ranks):
    assert read_allocation({**SLURM, **env}, ["n1", "n2"]).ranks_per_node == ranks


def test_slurms_counts_by_node():
    assert expand_counts("4(x2),8") == [4, 4, 8]


def test_a_task_of_srun_gets_horovods_variables():
    """Two nodes, with 3 and 1 ranks: this is the second rank of the first one."""
    env = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    said = horovod_environment({**env, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURMD_NODENAME": "n1"})
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "HOSTNAME")
    assert [said[f"HOROVOD_{name}"] for name in names] == ["1", "4", "1", "3", "0", "1", "n1"]


PMIX = "MPI plugin types are...\n\tpmix\n\tnone\nspecific pmix plugin versions available: pmix_v4"


@pytest.mark.parametrize(
    ("site", "chosen", "why"),
    [
        ((PMIX, "/bin/mpirun", True), "pmix", "srun has pmix"),
        (("none pmi2", "/bin/mpirun", True), "mpirun", "srun has no pmix"),
        (("none pmi2", None, True), "gloo", "no mpirun"),
        ((PMIX, "/bin/mpirun", False), "gloo", "Horovod has no MPI"),
    ],
)
def test_the_launcher_is_what_the_site_has(site, chosen, why):
    srun_mpi, mpirun, horovod_mpi = site
    site = {"srun_mpi": srun_mpi, "mpirun": mpirun, "horovod_mpi": horovod_mpi}
    launcher, said = choose_launcher("auto", **site)
    assert launcher == chosen and why in said
    if chosen == "gloo":
        with pytest.raises(ConfigError, match="--launcher pmix, but"):
            choose_launcher("pmix", **site)


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("printf 'MPI plugin types are...\\n\\tnone\\n\\tpmix\\n'", "pmix"),
        (
            "printf 'srun: MPI types are...\\nsrun: none\\nsrun: pmix_v3\\nsrun: pmix\\n' >&2",
            "pmix",
        ),  # before 22.05
        ("printf 'none\\n'; echo 'srun: error: mpi/pmix: can not load PMIx library' >&2", "mpirun"),
    ],
)
def test_mpi_types_are_read_wherever_srun_prints_them(tmp_path, monkeypatch, said, chosen):
    (tmp_path / "srun").write_text(f"#!/bin/sh\n{said}\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    types = client.mpi_types()
    assert choose_launcher("auto", srun_mpi=types, mpirun="/bin/mpirun", horovod_mpi=True)[0] == chosen


@pytest.fixture
def only_singularity(tmp_path, monkeypatch):
    (tmp_path / "singularity").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_containers_wrap_what_ranks_run(only_singularity, tmp_path, monkeypatch):
    """SingularityCE's program has its old name; Pyxis starts in the image's folder, and shows no other."""
    monkeypatch.chdir(tmp_path)
    owt = ["owt", "train", "/my data"]
    argv = ranks_argv(Launcher.GLOO, ALLOCATION, owt, Container(apptainer="image.sif", mounts="/a:/b"))
    assert argv[0] == "srun" and "--mpi=none" in argv and "--kill-on-bad-exit=1" in argv
    assert "--distribution=block" in argv  # SLURM_DISTRIBUTION may say cyclic
    shim = ["owt", "job", "rank"]
    words = ["singularity", "exec", "--nv", "--bind", "/a:/b", "image.sif", *shim, *owt]
    assert argv[argv.index("singularity") :] == words
    argv = ranks_argv(Launcher.PMIX, ALLOCATION, owt, Container(pyxis="docker://x", mounts="/a:/b"))
    options = ["image=docker://x", f"mounts={tmp_path}:{tmp_path},/a:/b", f"workdir={tmp_path}"]
    assert argv[-6:] == [*(f"--container-{option}" for option in options), *owt]
    assert ranks_argv(Launcher.MPIRUN, ALLOCATION, ["/x/owt"])[-1] == "/x/owt"


def test_a_site_without_apptainer_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="neither apptainer nor singularity .*--module"):
        ranks_argv(Launcher.GLOO, ALLOCATION, ["owt"], Container(apptainer="image.sif"))


def test_packages_in_a_home_that_a_container_shows_are_not_used_unless_asked_for():
    """Apptainer mounts the home: ~/.local may have another torch than the image."""
    assert Container(apptainer="x").environment({}) == {"PYTHONNOUSERSITE": "1"}
    assert Container(apptainer="x").environment({"PYTHONNOUSERSITE": ""}) == {}
    assert Container().environment({}) == {}


def test_mpiruns_daemons_get_all_cores_and_gpus_of_their_node(tmp_path, monkeypatch):
    """Whatever was asked for per task, or set by the user: some sites advise to export SRUN_CPUS_PER_TASK."""
    (tmp_path / "mpirun").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("SRUN_CPUS_PER_TASK", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_PER_TASK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_TRES_PER_TASK", "cpu=1")  # "set by two different environment variables"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    env = {**SLURM, "SLURM_NTASKS": "4", "SLURM_GPUS_PER_TASK": "a100:1", "SLURM_GPUS_ON_NODE": "2"}
    argv = ranks_argv(Launcher.MPIRUN, read_allocation(env, ["n1", "n2"]), ["owt", "train"])
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in sorted(said) if line.startswith(("SLURM", "SRUN"))] == [
        "SLURM_GPUS_PER_NODE=2",
        "SLURM_JOB_ID=7",
        "SRUN_CPUS_PER_TASK=8",
    ]
    argv = ranks_argv(Launcher.MPIRUN, ALLOCATION, ["owt", "train"])
    assert not any(word.startswith("SLURM_GPUS_PER_NODE=") for word in argv)


def test_an_interface_decides_where_the_jobs_nodes_are_reached_by_several(tmp_path, monkeypatch):
    """The error that names them says `--interface NAME`, which the batch process gets from the script."""
    ways = {"n1": "eth0", "n2": "ib0"}
    monkeypatch.setattr(interfaces, "interface_towards", ways.get)
    monkeypatch.setattr(interfaces.psutil, "net_if_addrs", lambda: {"eth0": [], "ib0": []})
    monkeypatch.setattr(batch, "ask", lambda argv: "n1\nn2\n")
    monkeypatch.setattr(batch, "mpi_types", lambda: PMIX)
    monkeypatch.setattr(batch, "horovod_has_mpi", lambda: True)
    monkeypatch.setattr(batch.Ranks, "run", lambda self, command: self._interface == "ib0")
    monkeypatch.setattr(batch.signal, "signal", lambda *_: None)
    for name, value in {**SLURM, "SLURM_JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(name, value)
    script = rendered("--kind", "preflight", "--interface", "ib0", "D")
    words = words_that_arrive(script, tmp_path)
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 1  # True: ran, with ib0
    with pytest.raises(ConfigError, match="n1 by eth0, n2 by ib0; .*--interface NAME"):
        CliRunner().invoke(cli, ["job", "run", "--", "preflight"], catch_exceptions=False)


def test_each_attempt_finds_the_same_run_folder_and_each_task_its_own():
    assert owt_args(["train", "D"], ALLOCATION) == ["train", "D", "--run-dir", "runs/slurm-7"]
    array = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    task = read_allocation({**SLURM, **array}, ["n1", "n2"])
    assert owt_args(["train", "D", "--set", "seed={task}"], task)[-3:] == [
        "seed=2",
        "--run-dir",
        "runs/slurm-5_2",
    ]
    assert owt_args(["train", "D", "--run-dir", "runs/{task}"], task)[-1] == "runs/2"
    with pytest.raises(ConfigError, match="one --run-dir for all tasks"):
        owt_args(["train", "D", "--run-dir", "runs/a"], task)
    assert owt_args(["preflight"], ALLOCATION) == ["preflight"]
