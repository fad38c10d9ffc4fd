"""Preflight of real jobs on a real Slurm: on sound hosts, and with planted faults."""

import json
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "slurm" / "preflight.sbatch"
LIMIT_S = 90
FAKE_TORCH = "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"


def preflight(slurm, folder: Path, *words, script: Path = SCRIPT) -> tuple[int, list[dict], str]:
    """Submit a preflight with these words of sbatch's and, after None, of its own.

    Gives its exit code, its findings, and what it said beside them.
    """
    cut = words.index(None)
    argv = ["sbatch", "--parsable", "--output=out", "--error=err", *words[:cut], script, *words[cut + 1 :]]
    job_id = slurm.run(*argv, "--json", cwd=folder).strip()
    end = time.monotonic() + LIMIT_S
    while (job := slurm.job(job_id))["JobState"] not in ("COMPLETED", "FAILED", "TIMEOUT"):
        assert time.monotonic() < end, (folder / "err").read_text()
        time.sleep(0.2)
    said, err = (folder / "out").read_text(), (folder / "err").read_text()
    assert said.startswith("{"), err
    return int(job["ExitCode"].partition(":")[0]), json.loads(said)["findings"], err


def bad(findings: list[dict]) -> dict[str, tuple[str, ...]]:
    """Check -> hosts, of the findings that are bad."""
    return {finding["check"]: tuple(finding["hosts"]) for finding in findings if not finding["ok"]}


def saw(findings: list[dict], check: str) -> str:
    return next(finding["saw"] for finding in findings if finding["check"] == check)


@pytest.mark.alone  # whoever slows a network down is told
def test_on_three_sound_hosts_nothing_is_bad(slurm, images, tmp_path):
    start = time.monotonic()
    code, findings, said = preflight(slurm, tmp_path, "--nodes=3", None, images, "--run-dir", "runs/first")
    assert [finding for finding in findings if not finding["ok"]] == [] and code == 0, said
    assert time.monotonic() - start < 60
    assert "3 pairs of hosts" in saw(findings, "pairs") and "eth0 on 3 hosts" in saw(findings, "interface")
    assert saw(findings, "ranks") == "3 answered: n1 (rank 0), n2 (rank 1), n3 (rank 2)"
    assert saw(findings, "data").startswith("set 48 + 12 images of 2 classes")
    assert "bus bandwidth" in saw(findings, "allreduce")
    assert not list(tmp_path.glob(".owt-preflight*")) and not (tmp_path / "runs").exists()


@contextmanager
def on_host(slurm, name: str, do: list, undo: list):
    slurm.run(*do, host=name)
    try:
        yield
    finally:
        slurm.run(*undo, host=name)


@pytest.fixture
def other_torch_on_n2(slurm, tmp_path_factory):
    """A batch script whose PATH has an `owt` that meets another torch on n2, as far as its metadata goes."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "packages" / "torch-2.13.0.dist-info").mkdir(parents=True)
    (folder / "packages" / "torch-2.13.0.dist-info" / "METADATA").write_text(FAKE_TORCH)
    owt = slurm.environment()["PATH"].partition(":")[0] + "/owt"
    (folder / "owt").write_text(
        f"#!/bin/sh\n[ `hostname` = n2 ] && export PYTHONPATH='{folder}/packages'\nexec '{owt}' \"$@\"\n"
    )
    (folder / "owt").chmod(0o755)
    script = folder / "preflight.sbatch"
    lines = SCRIPT.read_text().splitlines(keepends=True)
    script.write_text("".join([*lines[:-1], f"export PATH='{folder}':$PATH\n", lines[-1]]))
    return script


@pytest.mark.alone
def test_each_planted_fault_is_found_at_its_host_in_one_run(slurm, images, other_torch_on_n2, tmp_path):
    """n2 has another torch and cannot resolve n3; n3 has no data and a slow link; n1 has little room."""
    runs = tmp_path / "runs"
    runs.mkdir()
    without_n3 = tmp_path / "hosts"
    lines = (slurm.folder / "hosts").read_text().splitlines(keepends=True)
    without_n3.write_text("".join(line for line in lines if not line.endswith(" n3\n")))
    shaped = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "400mbit", "burst", "256kb"]
    with ExitStack() as faults:
        for host, do, undo in (
            ("n2", ["mount", "--bind", without_n3, "/etc/hosts"], ["umount", "/etc/hosts"]),
            ("n3", ["mount", "-t", "tmpfs", "none", images], ["umount", images]),
            ("n3", [*shaped, "latency", "50ms"], ["tc", "qdisc", "del", "dev", "eth0", "root"]),
            ("n1", ["mount", "-t", "tmpfs", "-o", "size=1m", "none", runs], ["umount", runs]),
        ):
            faults.enter_context(on_host(slurm, host, do, undo))
        words = ["--nodes=3", None, images, "--run-dir", runs]
        code, findings, said = preflight(slurm, tmp_path, *words, script=other_torch_on_n2)
    found = [(finding["check"], tuple(finding["hosts"])) for finding in findings if not finding["ok"]]
    assert sorted(found) == sorted(
        [
            ("versions: torch", ("n2",)),
            ("host names", ("n3",)),
            ("data", ("n3",)),
            ("pairs", ("n1", "n3")),
            ("pairs", ("n2", "n3")),
            ("room for checkpoints", ("n1",)),
            ("shared run folder", ("n2", "n3")),  # what n1 has mounted, nobody else sees
        ]
    ), said
    assert code == 3 and "7 bad findings" in said
    assert saw(findings, "versions: torch").endswith("2.13.0 on n2 (rank 1)")
    assert "seen from n2" in saw(findings, "host names")


def test_two_ranks_that_slurm_gave_one_gpu_are_reported(slurm, tmp_path):
    """--gres=gpu:1 shows both tasks of a node the same GPU; the driver is a fake, as nobody here has one."""
    program = REPO / "tests" / "parallel" / "programs" / "gpus.py"
    (tmp_path / "owt").write_text(f'#!/bin/sh\nexec python "{program}" "$@"\n')
    (tmp_path / "owt").chmod(0o755)
    script = tmp_path / "preflight.sbatch"
    lines = SCRIPT.read_text().splitlines(keepends=True)
    fake = f"export PATH='{tmp_path}':$PATH PYTHONPATH='{REPO}' OWT_TEST_GPUS=2\n"
    script.write_text("".join([*lines[:-1], fake, lines[-1]]))
    code, findings, said = preflight(
        slurm, tmp_path, "--nodes=1", "--ntasks-per-node=2", "--gres=gpu:1", None, script=script
    )
    assert code == 3 and bad(findings)["device sharing"] == ("n1",), said
    assert "ranks 0, 1 on host n1 share" in saw(findings, "device sharing")
