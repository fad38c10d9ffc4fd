"""`owt bench scaling` on real ranks, and launch/two-hosts with real network namespaces."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from real_ranks import OWT, SMALL

from horovod_owt.model import build_model

TWO_HOSTS = Path(__file__).parents[2] / "launch" / "two-hosts"
KEYS = {"strategy", "precision", "ranks", "batch_per_rank", "step_ms", "images_per_s", "images_per_s_p25"}
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")), reason="needs root, ip and tc"
)


@pytest.mark.slow
def test_bench_scaling_holds_strategies_against_ddp_and_one_rank(run):
    done = run(
        [*OWT, "bench", "scaling", *SMALL, "--set", "batch=2", "--against", "ddp"]
        + ["--steps", "2", "--warmup", "1", "--count-interface", "lo"]
        + ["--predict", "cpu-2-cores", "--json"],
        limit_s=280,
        HOROVOD_GLOO_SHARED_MEMORY="0",  # the bytes on the wire are counted
    )
    report = done.json()
    rows = {(row["strategy"], row["ranks"]): row for row in report["rows"]}
    together, alone = ("ddp", "ddp-tuned", "data", "hybrid"), ("ddp", "ddp-tuned", "data")
    assert list(rows) == [(name, 2) for name in together] + [(name, 1) for name in alone]
    one_rank = rows["data", 1]["images_per_s_p25"]
    for (strategy, ranks), row in rows.items():
        ours = {"bytes_sent_per_step", "exposed_comm_share", "predicted_step_ms"}
        ours = ours if strategy in ("data", "hybrid") else set()
        assert row.keys() == KEYS | ours | {"efficiency", "wire_bytes_per_step"}
        assert (row["precision"], row["batch_per_rank"]) == ("fp32", 2)
        assert row["images_per_s_p25"] == pytest.approx(2e3 * ranks / row["step_ms"]["p25"])
        assert row["efficiency"] == pytest.approx(row["images_per_s_p25"] / (ranks * one_rank))

    def ratio(ours, theirs):
        return rows[ours]["images_per_s_p25"] / rows[theirs]["images_per_s_p25"]

    assert report["ratios"] == pytest.approx(
        {
            **{f"{a}/{b}": ratio((a, 2), (b, 2)) for a in together[2:] for b in together[:2]},
            "hybrid/data": ratio(("hybrid", 2), ("data", 2)),
            "data/ddp on one rank": ratio(("data", 1), ("ddp", 1)),
            "data/ddp-tuned on one rank": ratio(("data", 1), ("ddp-tuned", 1)),
            "data per rank/data on one rank": ratio(("data", 2), ("data", 1)) / 2,
            "hybrid per rank/data on one rank": ratio(("hybrid", 2), ("data", 1)) / 2,
        }
    )
    predicted = {
        name: row["predicted_step_ms"] for name, row in rows.items() if name[0] in ("data", "hybrid")
    }
    assert predicted["data", 2] > predicted["hybrid", 2] > 0 < predicted["data", 1]
    parameters = sum(p.numel() for p in build_model("alexnet-owt", 1000).parameters())
    assert rows["data", 2]["bytes_sent_per_step"] == pytest.approx(4 * parameters, rel=0.01)
    assert rows["hybrid", 2]["bytes_sent_per_step"] < 0.1 * 4 * parameters
    assert rows["data", 1]["bytes_sent_per_step"] == 0
    # what crossed the wire is at least what the gradients take, also in torch's processes
    assert all(rows[name, 2]["wire_bytes_per_step"] > 4 * parameters for name in together[:3])


BAD = {
    ("--predict", "cpu-2-core"): "fix: --predict cpu-2-cores",
    ("--strategies", "data,modle"): "'modle'; wanted data or hybrid",
    ("--count-interface", "eth77"): "--count-interface eth77; wanted one of",
    ("--against", "ddp", "--set", "model=alexnet-owt-bn"): "alexnet-owt, which torchvision has too",
}


@pytest.mark.parametrize("options", BAD, ids=" ".join)
def test_bench_scaling_refuses_in_one_line(run, options):
    done = run([*OWT, "bench", "scaling", *options], launcher="none", exit_code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("owt: ") and BAD[options] in line


REPORT_HOSTS = """
import json, os, socket, torch
from horovod_owt.parallel import runtime
from horovod_owt.parallel.collectives import gather_objects, sum_over_ranks
from horovod_owt.parallel.device import CPU

world = runtime.init(CPU)
total = sum_over_ranks(torch.ones(2), "ones").tolist()
addresses = {name: socket.gethostbyname(name) for name in gather_objects(socket.gethostname(), "names")}
memories = gather_objects(os.stat("/dev/shm").st_dev, "memories")
if world.is_root:
    print(json.dumps({"total": total, "addresses": addresses, "share_memory": len(set(memories)) < 2}))
runtime.shutdown()
"""


def left_behind() -> set[str]:
    """Namespaces and their files of two-hosts, whoever's."""
    folders = (Path("/run/netns"), Path("/etc/netns"))
    return {str(path) for folder in folders if folder.is_dir() for path in folder.glob("owt-*")}


@needs_namespaces
def test_two_hosts_meet_and_vanish(run):
    before = left_behind()
    done = run([TWO_HOSTS, "--", "python", "-c", REPORT_HOSTS], launcher="none")
    addresses = {"host0": "192.0.2.1", "host1": "192.0.2.2"}
    assert done.json() == {"total": [2, 2], "addresses": addresses, "share_memory": False}
    assert left_behind() <= before


@needs_namespaces
def test_two_hosts_vanish_on_ctrl_c_and_when_a_rank_fails(start):
    before = left_behind()
    job = start([TWO_HOSTS, "--", "sh", "-c", 'echo "$$"; exec sleep 100'], launcher="none")
    rank_pids = [int(job.process.stdout.readline()), int(job.process.stderr.readline())]
    job.process.send_signal(signal.SIGINT)
    assert job.finish(20).exit_code == 130
    assert not any(Path("/proc", str(pid)).exists() for pid in rank_pids)
    fails = 'test "$HOROVOD_RANK" = 0 || exit 7; sleep 100'
    began = time.monotonic()
    assert start([TWO_HOSTS, "--", "sh", "-c", fails], launcher="none").finish(60).exit_code == 7
    assert time.monotonic() - began < 50
    assert left_behind() <= before


def test_two_hosts_need_root_and_tools():
    done = subprocess.run(
        [shutil.which("python3"), TWO_HOSTS, "--", "true"], capture_output=True, text=True, env={"PATH": ""}
    )
    wanted = (
        "ip and tc not found; fix: apt install iproute2, or /usr/sbin on PATH"
        if os.geteuid() == 0
        else 'making network namespaces needs root; fix: sudo env "PATH=$PATH" launch/two-hosts ...'
    )
    assert (done.returncode, done.stderr, done.stdout) == (2, f"two-hosts: {wanted}\n", "")
