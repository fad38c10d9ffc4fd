"""What a run remembers, on one rank: nothing is lost from a snapshot to the run that goes on from it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from horovod_owt.config import TrainConfig, from_mapping
from horovod_owt.errors import ConfigError
from horovod_owt.model import alexnet_owt
from horovod_owt.parallel.elastic import ElasticState
from horovod_owt.parallel.exchange import Slice
from horovod_owt.parallel.runtime import World
from horovod_owt.runs.checkpoints import checkpoint_folder, find_fault, list_checkpoints, step_of
from horovod_owt.runs.opening import Opened
from horovod_owt.train import state
from horovod_owt.train.checkpoint import write_checkpoint
from horovod_owt.train.replica import AVERAGE, MOMENTUM, Replica
from horovod_owt.train.state import (
    Due,
    Position,
    allocate_snapshot,
    commit,
    restore,
    restore_commit,
    snapshot,
)

IMAGES = 40
CONFIG = TrainConfig(model="alexnet-owt-bn", classes=3, image_size=63, fc_group_size=1)
ROOT = World(0, 1, 0, 1, "here", torch.device("cpu"), 1)


@pytest.fixture(autouse=True, scope="module")
def alone():
    """Few hidden units, and collectives of one rank, which need no Horovod."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alexnet_owt, "HIDDEN", 10)
        patch.setattr(state, "on_root", lambda action, name: action())
        patch.setattr(state, "broadcast_tensor", lambda tensor, name: tensor)
        yield


def replica(seed: int, **values) -> Replica:
    """One with weights, running statistics and momentum of its own."""
    made = Replica(replace(CONFIG, seed=seed, **values), ROOT)
    draw = torch.Generator().manual_seed(seed)
    for _, tensor, _ in made.state_tensors():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=draw))
        else:
            tensor.fill_(seed)  # how many batches a normalisation has seen
    return made


def tensors(made: Replica) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor, _ in made.state_tensors()}


def without_hosts() -> ElasticState:
    """A commit in a world whose hosts do not change."""
    elastic_state = ElasticState(torch.device("cpu"))
    elastic_state.check_host_updates = lambda: None
    return elastic_state


def saved(made: Replica, position: Position, *, validation_due: bool = False):
    return snapshot(made, position, allocate_snapshot(made), validation_due=validation_due)


@pytest.fixture(scope="module")
def checkpoints(alone, tmp_path_factory):
    """Of seeds 4 and 8, after as many steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (4, 8):
        checkpoint = saved(replica(step), Position(IMAGES, step, 5 * step), validation_due=step == 8)
        write_checkpoint(folder, checkpoint)
    return folder


@pytest.fixture
def run_dir(checkpoints, tmp_path):
    """A run's folder with these checkpoints."""
    return shutil.copytree(checkpoints, tmp_path / "run")


def test_epochs_are_counted_with_their_fraction():
    assert Position(IMAGES, step=5, consumed=50).epoch == 1.25


def test_later_steps_leave_a_snapshot_alone():
    made = replica(1)
    before = tensors(made)
    kept = saved(made, Position(IMAGES, 3, 24))
    for _, tensor, _ in made.state_tensors():
        tensor.zero_()
    assert kept.model.keys() == made.strategy.model.state_dict().keys()
    parameters = dict(made.strategy.model.named_parameters())
    assert kept.optimizer.keys() == {f"{MOMENTUM}{name}" for name in parameters}
    for name, tensor in (kept.model | kept.optimizer).items():
        assert torch.equal(tensor, before[name]), name


def test_a_snapshot_says_where_the_run_was_and_what_it_was():
    kept = saved(replica(6), Position(IMAGES, 3, 24), validation_due=True).state
    told = ("step", "epoch", "samples_consumed", "num_samples", "validation_due", "seed", "world_size")
    assert [kept[key] for key in told] == [3, 0.6, 24, IMAGES, True, 6, 1]
    assert from_mapping(kept["config"]) == replace(CONFIG, seed=6)
    assert kept["versions"]["torch"] in torch.__version__
    json.dumps(kept)  # plain numbers and words


def test_ranks_other_than_0_make_no_room_and_keep_nothing():
    made = replica(1)
    made.world = replace(ROOT, rank=1, size=2)
    assert allocate_snapshot(made) == {}
    assert snapshot(made, Position(IMAGES), {}, validation_due=False) is None


@pytest.mark.parametrize("step", [4, 8])
def test_a_checkpoint_is_restored_to_the_bit(run_dir, step):
    made, position = replica(1), Position(IMAGES)
    due = restore(made, position, run_dir, checkpoint_folder(run_dir, step))
    assert (position.step, position.consumed, due.validation) == (step, 5 * step, step == 8)
    wanted = tensors(replica(step))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(made).items())


def test_without_a_checkpoint_a_run_starts_from_scratch(run_dir):
    made, position = replica(1), Position(IMAGES)
    before = tensors(made)
    assert restore(made, position, run_dir, None) == Due()
    assert position == Position(IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(made).items())


@pytest.mark.parametrize(("validated", "due"), [([], True), ([4], True), ([4, 8], False)])
def test_a_validation_is_due_until_the_run_has_a_score_of_that_step(run_dir, validated, due):
    """After a start from a checkpoint, and after ranks have regrouped."""
    lines = [{"kind": "step", "step": 8}, *({"kind": "validation", "step": step} for step in validated)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    newest, older = (checkpoint_folder(run_dir, step) for step in (8, 4))
    assert restore(replica(1), Position(IMAGES), run_dir, newest) == Due(validation=due)
    assert restore(replica(1), Position(IMAGES), run_dir, older) == Due()
    for step, still in ((8, due), (4, not validated)):
        made, elastic_state = replica(1), without_hosts()
        commit(made, Position(IMAGES, step, 40), elastic_state, Opened(run_dir), validation_due=True)
        assert restore_commit(made, Position(IMAGES), elastic_state) == Due(validation=still)


def test_a_checkpoint_of_a_commit_is_due_until_it_is_on_disk(run_dir):
    """Its world may have lost rank 0 while it wrote."""
    made, elastic_state = replica(1), without_hosts()
    commit(made, Position(IMAGES, 8, 40), elastic_state, Opened(run_dir), checkpoint_due=True)
    assert restore_commit(made, Position(IMAGES), elastic_state) == Due()
    shutil.rmtree(checkpoint_folder(run_dir, 8))
    assert restore_commit(made, Position(IMAGES), elastic_state) == Due(checkpoint=True)
    commit(made, Position(IMAGES, 8, 40), elastic_state, Opened(run_dir))
    assert restore_commit(made, Position(IMAGES), elastic_state) == Due()


def test_no_checkpoint_is_ahead_of_the_commit_that_ranks_go_back_to(run_dir):
    made, elastic_state = replica(1), without_hosts()
    commit(made, Position(IMAGES, 6, 30), elastic_state, Opened(run_dir))
    restore_commit(made, Position(IMAGES), elastic_state)
    assert [step_of(folder) for folder in list_checkpoints(run_dir)] == [4]


def test_a_resumed_elastic_run_keeps_the_global_batch_of_its_checkpoint(run_dir):
    elastic_state = without_hosts()
    commit(replica(1), Position(IMAGES, 4, 20), elastic_state, Opened(run_dir, kept_global_batch=60))
    assert elastic_state.last.first_global_batch == 60


@pytest.mark.parametrize(
    ("made", "saw"),
    [
        ({"classes": 5}, r"step-00000008 has classifier.8.bias of shape \(3,\); wanted \(5,\)"),
        ({"model": "alexnet-owt"}, r"has classifier.2.bias of shape \(10,\); wanted none for alexnet-owt"),
    ],
    ids=["classes", "model"],
)
def test_a_checkpoint_of_another_net_is_refused_and_nothing_is_touched(run_dir, made, saw):
    other, position = replica(1, **made), Position(IMAGES)
    before = tensors(other)
    with pytest.raises(ConfigError, match=saw) as caught:
        restore(other, position, run_dir, checkpoint_folder(run_dir, 8))
    assert caught.value.exit_code == 2 and "fix:" in str(caught.value)
    assert position == Position(IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(other).items())


def test_a_rank_that_shares_its_fc_layers_takes_its_part_of_what_was_saved(run_dir, monkeypatch):
    made, name = replica(1), "classifier.1.weight"
    part = Slice(0, range(6, 10))
    own = torch.zeros(4, made.whole_shapes()[name][1])
    rest = [each for each in made.state_tensors() if each[0] != name]
    monkeypatch.setattr(made, "state_tensors", lambda: [*rest, (name, own, part)])
    restore(made, Position(IMAGES), run_dir, checkpoint_folder(run_dir, 8))
    assert torch.equal(own, tensors(replica(8))[name][6:10])


def test_the_average_of_the_weights_is_restored_to_the_bit(alone, tmp_path):
    saving = replica(4, ema=0.9)
    folder = write_checkpoint(tmp_path, saved(saving, Position(IMAGES, 4, 20)))
    made = replica(1, ema=0.9)
    restore(made, Position(IMAGES), tmp_path, folder)
    wanted, ours = tensors(saving), tensors(made)
    assert f"{AVERAGE}classifier.1.weight" in wanted and f"{AVERAGE}features.1.running_var" in wanted
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


def test_an_averaged_checkpoint_has_a_file_of_whole_weights_that_is_verified(alone, tmp_path):
    saving = replica(4, ema=0.9)
    folder = write_checkpoint(tmp_path, saved(saving, Position(IMAGES, 4, 20)))
    net = saving.strategy.model
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    file = folder / "average.safetensors"
    net.load_state_dict(load_file(file))
    assert not torch.equal(net.state_dict()["classifier.1.weight"], before["classifier.1.weight"])
    assert not find_fault(folder)
    file.write_bytes(file.read_bytes()[:-1])
    assert "average.safetensors does not match" in find_fault(folder)
    file.unlink()
    assert "average.safetensors is missing" in find_fault(folder)


def test_without_an_average_in_the_checkpoint_it_begins_at_its_weights(run_dir):
    made = replica(1, ema=0.9)
    restore(made, Position(IMAGES), run_dir, checkpoint_folder(run_dir, 8))
    wanted = tensors(replica(8))
    for name, tensor in tensors(made).items():
        assert torch.equal(tensor, wanted[name.removeprefix(AVERAGE)]), name


def test_a_run_without_an_average_resumes_from_a_checkpoint_with_one(alone, tmp_path):
    saving = replica(4, ema=0.9)
    folder = write_checkpoint(tmp_path, saved(saving, Position(IMAGES, 4, 20)))
    made = replica(1)
    restore(made, Position(IMAGES), tmp_path, folder)
    wanted = tensors(saving)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(made).items())


def test_a_commit_has_the_average():
    elastic_state, made = without_hosts(), replica(2, ema=0.9)
    wanted = tensors(made)
    commit(made, Position(IMAGES, 7, 56), elastic_state, Opened(Path("runs/a"), None))
    for _, tensor, _ in made.state_tensors():
        tensor.zero_()
    restore_commit(made, Position(IMAGES), elastic_state)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(made).items())


def test_a_commit_brings_weights_and_place_back():
    elastic_state, made = without_hosts(), replica(2)
    wanted = tensors(made)
    commit(made, Position(IMAGES, 7, 56), elastic_state, Opened(Path("runs/a"), None, "runs/base", attempt=3))
    assert (elastic_state.last.step, elastic_state.last.consumed) == (7, 56)
    assert (elastic_state.last.run_dir, elastic_state.last.first_global_batch) == (
        Path("runs/a"),
        CONFIG.batch,
    )
    assert (elastic_state.last.began_from, elastic_state.last.attempt) == ("runs/base", 3)
    for _, tensor, _ in made.state_tensors():
        tensor.zero_()
    newcomer, position = replica(3), Position(IMAGES)
    assert restore_commit(newcomer, position, elastic_state) == Due()
    assert (position.step, position.consumed) == (7, 56)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(newcomer).items())


@pytest.mark.parametrize(("before", "now"), [("sgd", "lars"), ("lars", "sgd"), ("lars", "lars")])
def test_momentum_of_another_optimizer_is_not_taken(alone, tmp_path, before, now):
    """SGD's, applied at LARS's rate of 1, would move the weights a hundred times too far."""
    saving, made = replica(4, optimizer=before), replica(1, optimizer=now)
    restore(made, Position(IMAGES), tmp_path, write_checkpoint(tmp_path, saved(saving, Position(IMAGES))))
    wanted = tensors(saving)
    for name, tensor in tensors(made).items():
        lost = name.startswith(MOMENTUM) and before != now
        assert torch.equal(tensor, torch.zeros_like(tensor) if lost else wanted[name]), name


def test_errors_of_compressed_gradients_are_saved_and_restored(tmp_path):
    """In a checkpoint and in a commit; of one rank here, which keeps what an earlier world left."""
    made = replica(1, compression="onebit")
    zeros = made.strategy.compression.gather()
    assert zeros.keys() == {f"error.classifier.{layer}.weight" for layer in (1, 5, 8)}
    errors = {name: zero + number for number, (name, zero) in enumerate(zeros.items(), 1)}
    made.strategy.compression.restore(errors)
    write_checkpoint(tmp_path, saved(made, Position(IMAGES, 4, 20)))
    elastic_state = without_hosts()
    commit(made, Position(IMAGES, 4, 20), elastic_state, Opened(tmp_path))
    from_disk, from_memory = (replica(2, compression="powersgd:1") for _ in range(2))
    restore(from_disk, Position(IMAGES), tmp_path, checkpoint_folder(tmp_path, 4))
    restore_commit(from_memory, Position(IMAGES), elastic_state)
    for after in (from_disk, from_memory):
        found = after.strategy.compression.gather()
        assert found.keys() <= errors.keys() and found
        assert all(torch.equal(error, errors[name]) for name, error in found.items())
        assert all(torch.equal(tensor, tensors(made)[name]) for name, tensor in tensors(after).items())


def test_a_run_without_compression_says_that_it_drops_the_errors(tmp_path, run_dir, caplog):
    write_checkpoint(tmp_path, saved(replica(1, compression="onebit"), Position(IMAGES, 4, 20)))
    restore(replica(2), Position(IMAGES), tmp_path, checkpoint_folder(tmp_path, 4))
    assert "errors of compressed gradients (onebit) are dropped with compression=none" in caplog.text
    begun = replica(2, compression="onebit")
    restore(begun, Position(IMAGES), run_dir, checkpoint_folder(run_dir, 4))
    assert not any(error.any() for error in begun.strategy.compression.gather().values())


def test_a_resumed_run_names_the_settings_that_it_changes(run_dir, caplog):
    def warnings(**values):
        caplog.clear()
        made = Replica(replace(CONFIG, seed=4, **values), ROOT)
        restore(made, Position(IMAGES), run_dir, checkpoint_folder(run_dir, 4))
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert warnings(log_every=3, batch=64, accum_steps=2, keep_checkpoints=9) == []  # the global batch is 128
    assert warnings(lr=0.5, schedule="constant", batch=32) == [
        "other settings than the checkpoint's: lr=0.5 (was 0.01), schedule=constant (was step:30:0.1), "
        "global batch 32 (was 128)"
    ]
