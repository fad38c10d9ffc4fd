"""`owt evaluate` on real ranks: the same counts at any number, beside a run that writes; Ctrl-C."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from real_ranks import NARROW, SMALL, launch, outcome, settings, wait_for
from torchvision.transforms import CenterCrop, Normalize, Resize, TenCrop, ToTensor

from horovod_owt.data.batch import MEAN, STD
from horovod_owt.inference.weights import read_trained_model
from horovod_owt.runs.checkpoints import list_checkpoints, read_best

pytestmark = pytest.mark.timeout(400)
SIDE = 64
COUNTS = ("images", "correct_top1", "correct_top5", "per_class", "confused")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run, and what `owt evaluate` said of it while it trained and replaced its checkpoints."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    keys = settings(epochs=5, checkpoint_every=1, keep_checkpoints=1, model="alexnet-owt-bn", lr=0.02)
    reports = []
    with launch([*NARROW, "train", images, "--run-dir", run_dir, *SMALL, *keys], launcher="none") as job:
        wait_for(lambda: list_checkpoints(run_dir))
        while job.process.poll() is None:
            scored = [*NARROW, "evaluate", images, run_dir, "--newest", "--json"]
            with launch(scored, ranks=1, launcher="none") as evaluation:
                done = evaluation.finish()
            assert done.exit_code == 0, done.stderr
            reports.append(done.json())
        assert job.finish().exit_code == 0
    assert outcome(run_dir)["exit_code"] == 0
    return run_dir, reports


def plain_loop(run_dir: Path, images: Path, crops: int, monkeypatch) -> dict:
    from horovod_owt.model import alexnet_owt

    monkeypatch.setattr(alexnet_owt, "HIDDEN", 98)
    model = read_trained_model(run_dir).build(torch.device("cpu"))
    normalise, to_tensor, hits = Normalize(MEAN, STD), ToTensor(), {}
    for label, folder in enumerate(sorted((images / "val").iterdir())):
        hits[folder.name] = 0
        for path in folder.iterdir():
            image = Resize(round(SIDE * 256 / 224))(Image.open(path).convert("RGB"))
            cut = [CenterCrop(SIDE)(image)] if crops == 1 else TenCrop(SIDE)(image)
            with torch.no_grad():
                logits = model(torch.stack([normalise(to_tensor(crop)) for crop in cut]))
            hits[folder.name] += int(logits.softmax(1).mean(0).argmax()) == label
    return hits


def test_a_run_is_scored_while_it_writes(trained):
    _, reports = trained
    steps = [report["step"] for report in reports]
    assert (
        steps == sorted(steps) and len(set(steps)) >= 2 and all(report["images"] == 26 for report in reports)
    )


@pytest.mark.parametrize("crops", [1, 10])
def test_any_number_of_ranks_counts_as_a_plain_loop_does(run, trained, images, monkeypatch, crops):
    run_dir, _ = trained
    command = [*NARROW, "evaluate", images, run_dir, "--json", "--crops", crops]
    command += settings(pipeline="torchvision", batch=4)
    ways = {"none": 1, "horovodrun": 3} if crops == 1 else {"mpirun": 2}
    found = [run(command, ranks=ranks, launcher=launcher).json() for launcher, ranks in ways.items()]
    wanted = plain_loop(run_dir, images, crops, monkeypatch)
    for report, ranks in zip(found, ways.values(), strict=True):
        assert {row["class"]: row["correct_top1"] for row in report["per_class"]} == wanted
        assert report["correct_top1"] == sum(wanted.values()) and report["ranks"] == ranks
        assert all(report[key] == found[0][key] for key in COUNTS)
        assert report["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert report["step"] == read_best(run_dir)["step"]


def test_a_net_of_other_classes_is_one_line_on_all_ranks(run, trained, tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            Image.new("RGB", (80, 80)).save(tmp_path / "set" / split / name / "1.JPEG")
    done = run([*NARROW, "evaluate", tmp_path / "set", trained[0]], exit_code=None)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if "owt: " in line]
    assert len(lines) == 1 and "has other classes: 2 of 2 labels changed class, first 0" in lines[0]
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_a_rank_that_waits_for_another(start, images, tmp_path):
    """Rank 0 reads its weights from a pipe that gives nothing; rank 1 waits for it in a collective."""
    pipe = tmp_path / "net.pth"
    os.mkfifo(pipe)
    job = start([*NARROW, "evaluate", images, pipe])

    def opened():
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None  # nobody reads yet

    writer = wait_for(opened)
    try:
        children = psutil.Process(job.process.pid).children(recursive=True)
        (rank1,) = [each for each in children if _rank(each) == "1"]
        rank1.send_signal(signal.SIGINT)
        psutil.wait_procs([rank1], timeout=10)
        assert not rank1.is_running() or rank1.status() == psutil.STATUS_ZOMBIE
        done = job.finish(60)
        assert done.exit_code != 0 and "Traceback" not in done.stderr
    finally:
        os.close(writer)


def _rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("HOROVOD_RANK") if "evaluate" in process.cmdline() else None
    except psutil.Error:
        return None


def test_the_report_is_the_only_thing_on_stdout(run, trained, images, tmp_path):
    picture = tmp_path / "confusion.svg"
    command = [*NARROW, "evaluate", images, trained[0], "--json", "--newest", "--confusion", picture]
    done = run(command, ranks=1, launcher="none")
    report = json.loads(done.stdout)
    assert report["images"] == 26 and report["top1"] == 100 * report["correct_top1"] / 26
    assert "26 images, centre crop of 64 px" in done.stderr and picture.exists()
