"""Real runs on real ranks, held against plain programs of one process."""

import json

import pytest
import torch
from real_ranks import NARROW, OWT, PROGRAMS, SMALL, outcome, records, settings
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.models import alexnet

from horovod_owt.data.feed import TrainFeed, ValidationFeed
from horovod_owt.data.pipeline import make_pipeline
from horovod_owt.data.store import open_data_set
from horovod_owt.model import alexnet_owt, build_model

STEPS, GLOBAL_BATCH = 4, 12


def weights_at(run_dir, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def distance(ours: dict, theirs: dict) -> float:
    """Euclidean, over all tensors."""
    assert ours.keys() == theirs.keys()
    return sum((ours[n].double() - theirs[n].double()).square().sum().item() for n in theirs) ** 0.5


@pytest.fixture(scope="module")
def plain(images):
    """The plain program: torchvision's net, torch's SGD, one process, the whole global batch at once."""
    folder = open_data_set(images)
    net = alexnet(num_classes=2, dropout=0.0)
    net.load_state_dict(build_model("alexnet-owt", 2, seed=5).state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    feed = TrainFeed(folder.train, seed=5, batch=GLOBAL_BATCH, scale=(0.35, 1.0))
    losses = []
    with make_pipeline("torchvision", feed, image_size=64, device_id=None, num_threads=1) as batches:
        for _ in range(STEPS):
            batch = next(batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch.images), batch.labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, {name: value.detach() for name, value in net.state_dict().items()}


def test_ranks_train_to_the_weights_of_one_process(run, images, tmp_path, plain):
    """With all hidden units: the other tests here do with few."""
    values = dict(batch=2, accum_steps=2, max_steps=STEPS, seed=5, dropout=0, channels_last="false")
    values |= dict(lr=0.02, lr_batch=GLOBAL_BATCH, pipeline="torchvision")
    run([*OWT, "train", images, "--run-dir", tmp_path, *SMALL, *settings(**values)], ranks=3)
    losses, weights = plain
    steps = records(tmp_path, "step")
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)
    (ranks,) = records(tmp_path, "ranks")  # of all steps but the first, which warms up, and the last
    assert ranks["steps"] == STEPS - 2 and len(ranks["compute_ms"]) == 3
    for part in ("data_wait_ms", "exposed_comm_ms"):
        mean = sum(step[part] for step in steps[1:-1]) / ranks["steps"]
        assert ranks[part][0] == pytest.approx(mean, rel=1e-3, abs=2e-3)
    ours, start = weights_at(tmp_path, STEPS), build_model("alexnet-owt", 2, seed=5).state_dict()
    torch.testing.assert_close(ours, weights, rtol=1e-5, atol=1e-5)
    # and against the way they went, which is where a wrong factor would show
    assert distance(ours, weights) < 1e-4 * distance(weights, start)


@pytest.mark.timeout(450)  # four jobs
def test_a_run_may_change_ranks_and_strategy_on_the_way(run, images, tmp_path, narrow_net):
    """2 ranks data-parallel, then 4 in hybrid, then 2 again, against one rank throughout: the same images,
    the same dropout, the same momentum."""

    def train(name: str, *, ranks: int, until: int, **values):
        values |= dict(max_steps=until, batch=8 // ranks, dropout=0.5, seed=5)
        launcher = "none" if ranks == 1 else "horovodrun"
        argv = [*NARROW, "train", images, "--run-dir", tmp_path / name, *SMALL, *settings(**values)]
        run(argv, ranks=ranks, launcher=launcher)

    train("unbroken", ranks=1, until=6)
    train("broken", ranks=2, until=2)
    train("broken", ranks=4, until=4, parallel="hybrid", fc_group_size=2)
    train("broken", ranks=2, until=6)
    broken, unbroken = (records(tmp_path / name, "step") for name in ("broken", "unbroken"))
    assert [step["step"] for step in broken] == [1, 2, 3, 4, 5, 6]
    assert [s["loss"] for s in broken] == pytest.approx([s["loss"] for s in unbroken], rel=1e-4)
    weights = [weights_at(tmp_path / name, 6) for name in ("broken", "unbroken")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    assert distance(*weights) < 1e-3 * distance(
        weights[1], build_model("alexnet-owt", 2, seed=5).state_dict()
    )

    # after step 4 it was the hybrid that validated
    net = build_model("alexnet-owt", 2)
    net.load_state_dict(weights_at(tmp_path / "broken", 4))
    by_the_book = score_by_the_book(net, images, best=2)
    by_the_book = {key: value for key, value in by_the_book.items() if not key.startswith("class_")}
    (score,) = [score for score in records(tmp_path / "broken", "validation") if score["step"] == 4]
    assert score | by_the_book | {"loss": score["loss"]} == score
    assert score["loss"] == pytest.approx(by_the_book["loss"], rel=1e-5)


def score_by_the_book(net, images, best: int = 5) -> dict:
    """Counts over all validation images in one batch."""
    store = open_data_set(images).val
    net = net.eval()
    feed = ValidationFeed(store, batch=len(store))
    with make_pipeline("auto", feed, image_size=64, device_id=None, num_threads=1) as batches:
        batch = next(batches)
    with torch.no_grad():
        logits = net(batch.images)
    hits = logits.topk(best).indices == batch.labels[:, None]
    return {
        "images": len(store),
        "correct_top1": int(hits[:, 0].sum()),
        "correct_top5": int(hits.sum()),
        "loss": F.cross_entropy(logits, batch.labels).item(),
        "class_images": batch.labels.bincount(minlength=logits.shape[1]).tolist(),
        "class_correct": batch.labels[hits[:, 0]].bincount(minlength=logits.shape[1]).tolist(),
    }


@pytest.fixture(scope="module")
def plain_score(images):
    """Of the net in validate.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alexnet_owt, "HIDDEN", 98)
        score = score_by_the_book(build_model("alexnet-owt", 8, seed=2), images)
    assert score["class_images"] == [13, 13, 0, 0, 0, 0, 0, 0]  # outputs without a class
    return score


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_counts_each_image_once(run, images, plain_score, ranks):
    score = run(["python", PROGRAMS / "validate.py", images], ranks=ranks).json()
    assert plain_score["images"] == 26  # no multiple of ranks x batch
    assert 0 < plain_score["correct_top1"] < plain_score["correct_top5"] < 26
    for key in ("images", "correct_top1", "correct_top5", "class_images", "class_correct"):
        assert score[key] == plain_score[key]
    assert score["loss"] == pytest.approx(plain_score["loss"], rel=1e-6)
    assert score["top1"] == pytest.approx(100 * plain_score["correct_top1"] / 26)


@pytest.mark.parametrize("launcher", ["mpirun", "none"])  # all other tests: horovodrun --gloo
def test_every_launcher_trains(run, images, tmp_path, launcher):
    ranks = 1 if launcher == "none" else 2
    command = [*NARROW, "train", images.name, "--run-dir", "runs/here", *SMALL]
    command += settings(max_steps=2, clip_norm=0.01)
    work = tmp_path / "work"  # relative paths mean the same on every rank
    work.mkdir()
    (work / images.name).symlink_to(images)
    done = run(command, ranks=ranks, launcher=launcher, cwd=work)
    run_dir = work / "runs" / "here"
    ended = outcome(run_dir)
    assert (ended.pop("attempt"), ended.pop("job_id")) == (1, None) and ended.pop("time")
    assert ended == {
        "exit_code": 0,
        "reason": "done",
        "step": 2,
        "epoch": 2 * 4 * ranks / 96,
        "bad_images": 0,
    }
    kinds = [json.loads(line)["kind"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(kinds[3:5]) == ["checkpoint", "validation"]  # written beside the validation
    assert kinds[:3] + kinds[5:] == ["run", "step", "step", "outcome"]
    assert all(
        step["grad_norm"] > 0.01 for step in records(run_dir, "step")
    )  # as it was before it was clipped
    (first,) = records(run_dir, "run")
    assert first["world_size"] == ranks and first["global_batch"] == 4 * ranks
    assert first["versions"]["horovod_controller"] == ("mpi" if "mpi" in launcher else "gloo")
    assert "step 2/2" in done.stderr + done.stdout and "top-1" in done.stderr + done.stdout


def test_an_error_of_rank_0_reaches_every_rank(run):
    assert (
        run(["python", PROGRAMS / "on_root.py"], ranks=3).json()["heard"]
        == ["seen; wanted wanted; fix: fix"] * 3
    )


def test_bench_step_prints_one_json_document(run, images, narrow_net):
    done = run(
        [*NARROW, "bench", "step", images, *SMALL, "--steps", "3", "--warmup", "1"]
        + ["--against", "plain", "--json"]
    )
    report = done.json()
    assert {k: report[k] for k in ("strategy", "precision", "ranks", "batch_per_rank", "steps")} == {
        "strategy": "data",
        "precision": "fp32",
        "ranks": 2,
        "batch_per_rank": 4,
        "steps": 3,
    }
    step_ms = report["step_ms"]
    assert 0 < step_ms["min"] <= step_ms["p25"] <= step_ms["median"] <= step_ms["p75"]
    assert report["images_per_s"] == pytest.approx(8e3 / step_ms["median"])
    assert 0 <= report["data_wait_share"] < 1 and 0 < report["exposed_comm_share"] < 1
    parameters = sum(p.numel() for p in build_model("alexnet-owt", 2).parameters())
    # 2 (n-1)/n for n = 2 of the gradients, and of eleven numbers: five facts, three times of each rank
    assert report["bytes_sent_per_step"] == 4 * (parameters + 11)
    assert report["method"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["against"]["name"] == "plain" and report["against"]["speedup_at_p25"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "compile"])
def test_bench_step_compares_with_torch_alone_without_a_launcher(run, images, name):
    argv = [*NARROW, "bench", "step", images, *SMALL, "--steps", "2", "--warmup", "1", "--against", name]
    report = run([*argv, "--json"], launcher="none").json()
    assert report["ranks"] == 1 and report["against"]["name"] == name
    assert report["against"]["speedup_at_p25"] > 0
