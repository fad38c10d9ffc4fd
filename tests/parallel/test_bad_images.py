"""A data set with one of each bad file, on real ranks: trained through, refused, and verified."""

import json
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
from bad_files import BAD, ODD, encoded, spoil, undecodable
from real_ranks import NARROW, OWT, PROGRAMS, SMALL, launch, outcome, records
from safetensors.torch import load_file
from test_bad_input import WITHOUT_ROOTS_RIGHTS
from test_training import distance, settings
from torch.nn import functional as F

from horovod_owt.data.faults import BadImages
from horovod_owt.data.feed import TrainFeed, ValidationFeed
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import open_data_set
from horovod_owt.model import build_model

KINDS = ["torchvision", *(["dali"] if find_spec("nvidia.dali") else [])]
BATCH, RANKS = 6, 2
STEPS = 10  # an epoch of 96 images is 8 of them: known files come again in the last two
GUARD = WITHOUT_ROOTS_RIGHTS if os.geteuid() == 0 else []  # root may read anything


@pytest.fixture(scope="module")
def spoilt(images, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The data set, and path -> fault of its bad files. What is bad for both decoders only."""
    root = shutil.copytree(images, tmp_path_factory.mktemp("spoilt") / "data")
    train, val = (sorted(map(str, (root / split).rglob("*.JPEG"))) for split in ("train", "val"))
    bad = spoil(train[5 : 5 + 6 * len(BAD) : 6])
    (unreadable, junk, *odd), truncated = train[2:9:2], val[7]
    Path(unreadable).chmod(0)
    bad[unreadable] = "unreadable: Permission denied"
    Path(junk).write_bytes(undecodable())
    bad[junk] = "undecodable"
    Path(truncated).write_bytes(encoded()[:-700])
    bad[truncated] = "truncated"
    for path, (data, _) in zip(odd, ODD.values(), strict=True):
        Path(path).write_bytes(data)
    return root, bad


# In fp64: in fp32 a unit whose input rounds to the other side of 0 moves the weights by 1.4e-4 of their way.
COMMON = dict(lr=0.02, lr_batch=BATCH * RANKS, batch=BATCH, seed=5, dropout=0, precision="fp64")


@pytest.fixture(scope="module")
def trained(spoilt, images, tmp_path_factory):
    """A folder of runs by name, all of one job of two ranks, and what was said."""
    out = tmp_path_factory.mktemp("runs")
    bad_val, no_good = (shutil.copytree(images, out / name) for name in ("bad val", "no good"))
    sorted((bad_val / "val").rglob("*.JPEG"))[-1].write_bytes(undecodable())
    for path in (no_good / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    skip = dict(bad_images="skip", max_steps=STEPS)
    runs = {kind: (spoilt[0], dict(pipeline=kind, **skip)) for kind in KINDS}
    runs |= {"fail in validation": (bad_val, dict(max_steps=1)), "no good image": (no_good, skip)}
    runs = [
        {"data": str(data), "run_dir": str(out / name), "settings": COMMON | values}
        for name, (data, values) in runs.items()
    ]
    with launch([*GUARD, "python", PROGRAMS / "several_runs.py", json.dumps(runs)], ranks=RANKS) as job:
        done = job.finish()
    assert done.exit_code == 0, done.stderr[-6000:]
    return out, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_each_bad_file_is_named_once_with_its_fault(spoilt, trained, kind):
    _, bad = spoilt
    out, said = trained
    said = said[said.index(f"run folder {out / kind}") :]
    said = said[: said.index("bad images skipped; ") + 20]
    faults = records(out / kind, "fault")
    assert Counter(line["path"] for line in faults) == Counter(bad.keys())
    assert all(bad[line["path"]] in line["fault"] for line in faults)
    assert {line["rank"] for line in faults} == {0, 1}
    for path in bad:
        (warning,) = [line for line in said.splitlines() if f"bad image {path}:" in line]
        assert "WARNING [rank" in warning
    assert records(out / kind, "outcome")[0]["bad_images"] == len(bad)
    assert f"{len(bad)} bad images skipped" in said


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_images_are_trained_on_as_one_process_would(spoilt, trained, narrow_net, kind):
    """Losses and weights of a plain program that has only the good images of each global batch."""
    root, bad = spoilt
    run_dir = trained[0] / kind
    data = open_data_set(root)
    net = build_model("alexnet-owt", 2, dropout=0.0, seed=5).double()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    feed = TrainFeed(data.train, seed=5, batch=BATCH * RANKS, scale=(0.35, 1.0), bad_images=BadImages())
    losses, counts = [], []
    with make_pipeline(kind, feed, image_size=64, device_id=None, num_threads=1) as batches:
        for batch in islice(batches, STEPS):
            good = [row for row, index in enumerate(batch.indices) if data.train.path(index) not in bad]
            optimizer.zero_grad()
            labels = torch.tensor(data.train.labels[batch.indices[good]])
            loss = F.cross_entropy(net(batch.images[good].double()), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            counts.append(len(batch.indices) - len(good))
    steps = records(run_dir, "step")
    assert [step["bad_images"] for step in steps] == counts and sum(counts) > len(bad)
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-6)
    weights = load_file(run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    assert distance(weights, net.state_dict()) < 1e-9 * distance(net.state_dict(), start)

    validations = records(run_dir, "validation")
    feed = ValidationFeed(data.val, batch=len(data.val), bad_images=BadImages())
    with make_pipeline(kind, feed, image_size=64, device_id=None, num_threads=1) as batches:
        batch = next(batches)
    net.load_state_dict(weights)
    with torch.no_grad():
        logits, labels = net.eval()(batch.images[batch.valid].double()), batch.labels[batch.valid]
    assert [score["bad_images"] for score in validations] == [1, 1]
    assert validations[-1]["images"] == len(labels) == 25
    assert validations[-1]["correct_top1"] == int((logits.argmax(1) == labels).sum())
    assert validations[-1]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_under_fail_every_rank_ends_with_the_name_of_the_file(run, images, tmp_path):
    root = shutil.copytree(images, tmp_path / "data")
    for path in sorted((root / "train").rglob("*.JPEG"))[3::4]:
        path.write_bytes(undecodable())
    argv = [*NARROW, "train", root, "--run-dir", tmp_path / "run", *SMALL, *settings(**COMMON)]
    done = run(argv, launcher="mpirun", exit_code=1, limit_s=100)  # fail is the default
    (line,) = [line for line in done.stderr.splitlines() if "owt:" in line]
    (first, *_) = records(tmp_path / "run", "fault")
    assert f"bad image {first['path']}: undecodable" in line and "fix:" in line
    ended = outcome(tmp_path / "run")
    assert ended["exit_code"] == 1 and ended["step"] == 0 and first["path"] in ended["reason"]
    assert not records(tmp_path / "run", "step")


@pytest.mark.parametrize(
    ("name", "step", "reason"),
    [
        ("fail in validation", 1, "bad image {}: undecodable"),
        ("no good image", 0, "no good image in step 1: bad image {}: empty file"),
    ],
)
def test_a_run_that_must_stop_reports_why(trained, name, step, reason):
    run_dir = trained[0] / name
    (outcome,) = records(run_dir, "outcome")
    assert (outcome["exit_code"], outcome["step"]) == (1, step)
    assert reason.format(records(run_dir, "fault")[0]["path"]) in outcome["reason"]
    assert not records(run_dir, "validation")


def verified(run, root: Path, *more: str, launcher: str = "none", exit_code: int = 3) -> dict:
    argv = [*GUARD, *OWT, "data", "verify", root, "--json", *more]
    return run(argv, ranks=2, launcher=launcher, exit_code=exit_code).json()


def test_verify_lists_every_bad_file_alone_and_over_ranks(run, spoilt):
    root, bad = spoilt
    report = verified(run, root, "--pipeline", "torchvision")
    assert set(report) == {"images", "bad", "remarks", "unread", "left_out"} and report["images"] == 96 + 26
    assert [line["path"] for line in report["bad"]] == sorted(bad)
    assert all(bad[line["path"]] in line["fault"] for line in report["bad"])
    wanted = {remark for _, remark in ODD.values()}
    assert len(report["remarks"]) == len(ODD)
    assert all(any(text in line["remark"] for text in wanted) for line in report["remarks"])
    assert verified(run, root, "--pipeline", "torchvision", launcher="mpirun") == report

    pytest.importorskip("nvidia.dali")
    assert verified(run, root, "--pipeline", "dali", "--workers", "1", launcher="horovodrun") == report
    only = verified(run, root, "--split", "val")
    assert only["images"] == 26 and only["bad"] == [line for line in report["bad"] if "/val/" in line["path"]]


def test_verify_of_good_files_is_quiet(run, images):
    report = verified(run, images, "--pipeline", "torchvision", exit_code=0)
    assert report == {"images": 96 + 26, "bad": [], "remarks": [], "unread": [], "left_out": []}
