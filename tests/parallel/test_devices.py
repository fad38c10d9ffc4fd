"""owt devices under the launchers, and ranks that were shown one device by mistake."""

import os
import socket

import pytest
from real_ranks import OWT, PROGRAMS, SMALL

GPUS = ["python", PROGRAMS / "gpus.py"]  # sees as many as OWT_TEST_GPUS says
UUID = f"GPU-{{}}-{socket.gethostname()}".format
SHARED = f"ranks 0, 1 on host {{}} share Tesla K80 {UUID(0)} (0000:00:00.0)".format
HOSTS = {"horovodrun": "localhost"}  # as horovodrun was told


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [pytest.param("horovodrun", 2, marks=pytest.mark.slow), ("mpirun", 3), ("none", 1)],
)
def test_rank_0_prints_the_devices_of_all(run, launcher, ranks):
    done = run([*OWT, "devices", "--json"], launcher=launcher, ranks=ranks, limit_s=60)
    rows = done.json()["devices"]
    assert [(row["rank"], row["device"]) for row in rows] == [(rank, "cpu") for rank in range(ranks)]
    assert {row["local_rank"] for row in rows} == set(range(ranks))  # Open MPI may count them otherwise
    assert {row["host"] for row in rows} == {HOSTS.get(launcher, socket.gethostname())}
    assert {cpu for row in rows for cpu in row["cores"]} <= os.sched_getaffinity(0)
    assert {row[key] for row in rows for key in ("uuid", "pci", "numa", "name")} == {None}


@pytest.mark.parametrize("launcher", ["horovodrun", pytest.param("mpirun", marks=pytest.mark.slow)])
def test_each_rank_has_a_line_with_its_gpu(run, launcher):
    done = run([*GPUS, "devices"], launcher=launcher, limit_s=60, OWT_TEST_GPUS="2")
    lines = [line for line in done.stdout.splitlines() if "Tesla K80" in line]
    for number, line in enumerate(lines):
        assert f"cuda:{number}" in line and f"{UUID(number)}  0000:0{number}:00.0" in line
    assert len(lines) == 2


def test_two_ranks_on_one_device_are_refused_after_the_table(run):
    one = {"CUDA_VISIBLE_DEVICES": "0", "OWT_TEST_GPUS": "2"}
    done = run([*GPUS, "devices"], launcher="mpirun", exit_code=2, limit_s=60, **one)
    assert done.stdout.count("Tesla K80") == 2
    assert SHARED(socket.gethostname()) in done.stderr
    meant = run([*GPUS, "devices", "--json"], launcher="mpirun", HOROVOD_OWT_SHARED_DEVICES="1", **one)
    assert [row["uuid"] for row in meant.json()["devices"]] == [UUID(0)] * 2


def test_a_host_with_too_few_gpus_is_named_after_the_table(run):
    done = run([*GPUS, "devices"], launcher="mpirun", ranks=3, exit_code=2, limit_s=60, OWT_TEST_GPUS="2")
    assert len([line for line in done.stdout.splitlines() if socket.gethostname() in line]) == 3
    assert done.stderr.count("3 ranks on host") == 1


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(run, images):
    """The CPU would do, silently, and the ranks of other hosts would wait for it."""
    done = run([*GPUS, "train", images, *SMALL], launcher="none", exit_code=2, limit_s=60, OWT_TEST_GPUS="1")
    assert "cannot use its Tesla K80" in done.stderr and "driver 470.256.02" in done.stderr


def test_ranks_on_one_device_do_not_train(run, images):
    done = run(
        ["python", PROGRAMS / "one_gpu.py", "train", images, *SMALL],
        exit_code=None,
        limit_s=90,
        CUDA_VISIBLE_DEVICES="0",
        OWT_TEST_GPUS="2",
    )
    assert done.exit_code != 0 and "epoch" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "owt:" in line]
    assert len(said) == 1 and SHARED("localhost") in said[0]


def test_tests_of_cpu_ranks_see_no_gpu_of_the_machine(run):
    show = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert run(["python", "-c", show], launcher="none").stdout.strip() == "''"
