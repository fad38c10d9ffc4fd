"""A run's configuration: where values come from, and what is refused."""

import json
import math
from contextlib import nullcontext

import pytest

from horovod_owt.config import TrainConfig, check_batch_norm, from_mapping, resolve
from horovod_owt.errors import ConfigError
from horovod_owt.recipe import DEFAULT_RECIPE, load_recipe, recipe_names
from horovod_owt.schedule import learning_rate
from horovod_owt.topology import Topology, resolve_group_size

# What each recipe is known for, and its learning rate on 2 ranks after so many epochs.
RECIPES = {
    "cosine-60": (
        dict(model="alexnet-owt", epochs=60, precision="bf16", label_smoothing=0.1, schedule="cosine"),
        {5: 0.01 * 0.5 * (1 + math.cos(math.pi / 12)), 30: 0.005, 60: 0.0},
    ),
    "large-batch": (
        dict(model="alexnet-owt-bn", epochs=100, optimizer="lars", schedule="poly:2", warmup_epochs=5),
        {5: 1.25 * 0.95**2, 50: 0.3125, 100: 0.0},
    ),
    "quickstart": (
        dict(model="alexnet-owt-bn", image_size=96, epochs=6, batch=32, schedule="cosine"),
        {1: 0.007 * 0.5 * (1 + math.cos(math.pi / 6)), 3: 0.0035, 6: 0.0},
    ),
    "torchvision-90": (
        dict(epochs=90, lr=0.01, lr_batch=256, momentum=0.9, weight_decay=1e-4, schedule="step:30:0.1"),
        {5: 0.01, 29: 0.01, 30: 1e-3, 60: 1e-4, 89: 1e-4},
    ),
    "torch7-55": (
        dict(model="alexnet-owt-bn", epochs=55, batch=128, momentum_reset=True, warmup_epochs=0.0),
        # twice the rates of the table, for twice its batch; its epochs are counted from 1
        {0: 0.02, 17.9: 0.02, 18: 0.01, 29: 2e-3, 43: 1e-3, 51.9: 1e-3, 52: 2e-4, 54.9: 2e-4},
    ),
}


def as_json(cfg: TrainConfig) -> dict:
    return json.loads(json.dumps(cfg.to_dict()))


def test_every_recipe_is_known_here():
    assert recipe_names() == sorted(RECIPES)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_to_the_values_in_its_file_and_to_defaults(name):
    said, cfg = load_recipe(name).values, resolve(name)
    assert said and as_json(cfg) == as_json(TrainConfig()) | said
    known, learning_rates = RECIPES[name]
    assert {key: getattr(cfg, key) for key in known} == known
    for epoch, lr in learning_rates.items():
        found = learning_rate(
            cfg.schedule,
            peak_lr=cfg.peak_lr(world_size=2),
            epoch=epoch,
            epochs=cfg.epochs,
            warmup_epochs=cfg.warmup_epochs,
            step_epochs=0.01,
        )
        assert found == pytest.approx(lr, abs=1e-12), epoch


def test_settings_overlay_the_recipe_in_their_order(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("batch: 7\nlr: 1e-3\nchannels_last: false\n")
    cfg = resolve(str(recipe), ["batch=8", "batch=9", "seed=3"])
    assert (cfg.batch, cfg.lr, cfg.channels_last, cfg.seed) == (9, 1e-3, False, 3)
    assert cfg.momentum == TrainConfig().momentum


def test_a_config_survives_json():
    for cfg in (resolve(DEFAULT_RECIPE, ["weight_decay=0.25"]), resolve("torch7-55")):
        assert from_mapping(as_json(cfg)) == cfg


@pytest.mark.parametrize(
    ("setting", "saw", "fix"),
    [
        ("batch=0", "batch=0; wanted at least 1", "batch=128"),
        ("batch=-3", "batch=-3; wanted at least 1", ""),
        ("batch=1.5", "wanted a whole number", "batch=128"),
        ("batch=many", "batch=many; wanted a whole number", ""),
        ("batch=true", "wanted a whole number", ""),
        ("lr=nan", "lr=nan; wanted a number", ""),
        ("channels_last=maybe", "wanted true or false", ""),
        ("image_size=62", "image_size=62; wanted at least 63", ""),
        ("precision=fp8", "wanted fp32 or bf16 or fp16", "precision=fp"),
        ("schedule=step:30", "wanted constant, cosine", "schedule=step:30:0.1"),
        ("schedule=poly:x", "wanted constant, cosine", ""),
        ("dropout=1", "between 0 and", ""),
        ("weightdecay=1", "unknown key 'weightdecay'", "weight_decay"),
        ("zzz=1", "unknown key 'zzz'", "known keys: model"),
        ("batch", "--set batch; wanted key=value", "--set batch=VALUE"),
    ],
)
def test_a_bad_setting_is_refused_with_what_was_wanted(setting, saw, fix):
    with pytest.raises(ConfigError) as caught:
        resolve(None, [setting])
    message = str(caught.value)
    assert saw in message and fix in message
    assert caught.value.exit_code == 2 and "\n" not in message


@pytest.mark.parametrize(
    ("text", "saw"),
    [
        ("batch: 8\nlr: 1: 2", "is not valid YAML at line 2"),
        ("- batch", "contains a list"),
        ("bach: 3", "unknown key 'bach'"),
        ("lr: true", "lr=True; wanted a number"),
    ],
)
def test_a_bad_recipe_file_is_refused(tmp_path, text, saw):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=saw):
        resolve(str(tmp_path / "bad.yaml"))


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="fix: use quickstart"):
        resolve("quikstart")


def test_learning_rate_and_steps_follow_the_global_batch():
    cfg = TrainConfig(batch=32, accum_steps=2, lr=0.1, lr_batch=256, epochs=3)
    assert cfg.global_batch(world_size=8) == 512
    assert cfg.peak_lr(world_size=8) == pytest.approx(0.2)
    assert cfg.total_steps(num_samples=1000, world_size=8) == 6  # 3000 images, the last batch is filled up
    assert cfg.total_steps(num_samples=1000, world_size=4) == 12


@pytest.mark.parametrize(
    ("max_steps", "done", "total"),
    [
        (0, dict(step=2, consumed=1024), 10),  # 1976 images are left for batches of 256
        (0, dict(step=6, consumed=3072), 6),  # nothing is
        (0, dict(step=9, consumed=4608), 9),  # it was longer before
        (4, {}, 4),
        (4, dict(step=2, consumed=1024), 4),
        (100, {}, 12),
    ],
)
def test_a_resumed_run_counts_on_and_max_steps_is_the_most(max_steps, done, total):
    cfg = TrainConfig(batch=32, accum_steps=2, epochs=3, max_steps=max_steps)
    assert cfg.total_steps(num_samples=1000, world_size=4, **done) == total


def test_fp16_is_refused_for_hybrid_only():
    assert resolve(None, ["precision=fp16", "parallel=auto"]).parallel == "auto"  # which makes it data
    with pytest.raises(ConfigError, match="precision=fp16 with parallel=hybrid"):
        resolve(None, ["precision=fp16", "parallel=hybrid"])


@pytest.mark.parametrize(
    ("settings", "saw", "fix"),
    [
        (["parallel=hybird"], "parallel=hybird; wanted data or hybrid or auto", "parallel=hybrid"),
        (["fc_group_size=0"], "fc_group_size=0; wanted node, all or a number of ranks", "fc_group_size=node"),
        (["fc_group_size=-2"], "fc_group_size=-2; wanted node, all or a number", ""),
        (["fc_group_size=many"], "fc_group_size=many; wanted node, all or a number", ""),
        (["fc_group_size=1.5"], "fc_group_size=1.5; wanted node, all or a number", ""),
        (["fc_group_size=²"], "fc_group_size=²; wanted node, all or a number", ""),
        (["owt_scheme=c"], "owt_scheme=c; wanted a or b", ""),
        (["parallel=hybrid", "fc_batch=local"], "fc_batch=local with owt_scheme=a", "owt_scheme=b"),
        (["owt_scheme=b", "fc_batch=local"], "fc_batch=local with parallel=data", "--parallel hybrid"),
        (
            ["parallel=hybrid", "owt_scheme=b", "sync_bn=true"],
            "sync_bn=true with owt_scheme=b",
            "owt_scheme=a",
        ),
        (["parallel=auto", "owt_scheme=b", "sync_bn=true"], "sync_bn=true with owt_scheme=b", ""),
        (
            ["optimizer=lars", "parallel=hybrid", "owt_scheme=b", "fc_batch=local"],
            "optimizer=lars with fc_batch=local",
            "fc_batch=global",
        ),
        (["optimizer=lars", "precision=fp16"], "optimizer=lars with precision=fp16", "precision=bf16"),
        (["parallel=hybrid", "precision=fp16"], "precision=fp16 with parallel=hybrid", "precision=bf16"),
    ],
)
def test_hybrid_settings_that_make_no_sense_are_refused(settings, saw, fix):
    with pytest.raises(ConfigError) as caught:
        resolve(None, settings)
    message = str(caught.value)
    assert saw in message and fix in message
    assert caught.value.exit_code == 2 and "\n" not in message


@pytest.mark.parametrize(
    "settings",
    [
        ["parallel=hybrid", "owt_scheme=b", "fc_batch=local"],
        ["parallel=hybrid", "sync_bn=true"],
        ["parallel=data", "owt_scheme=b", "sync_bn=true"],
        ["parallel=data", "precision=fp16"],
    ],
)
def test_what_makes_sense_together_is_taken(settings):
    resolve(None, settings)


@pytest.mark.parametrize(
    ("values", "ranks", "enough"),
    [
        (dict(batch=2), 1, True),
        (dict(batch=1), 2, False),
        (dict(batch=1, sync_bn=True), 1, False),
        (dict(batch=1, sync_bn=True), 2, True),
        (dict(batch=1, parallel="hybrid", fc_group_size=2), 4, True),  # of a group's images at once
        (dict(batch=1, parallel="hybrid", fc_group_size=2, owt_scheme="b"), 4, False),
    ],
)
def test_hidden_layers_are_not_normalised_over_one_image(values, ranks, enough):
    cfg = TrainConfig(**{"model": "alexnet-owt-bn", "fc_group_size": 1} | values)
    with nullcontext() if enough else pytest.raises(ConfigError, match="batch of 1 image; wanted at least 2"):
        check_batch_norm(cfg, ranks)


def job(world_size: int, local_size: int) -> Topology:
    return Topology("mpirun", 0, world_size=world_size, local_rank=0, local_size=local_size, host="gpu01")


@pytest.mark.parametrize(
    ("setting", "size"), [("node", 4), ("all", 8), (1, 1), (2, 2), (8, 8)]
)  # fmt: skip
def test_a_group_is_of_a_node_of_all_or_of_a_number_of_ranks(setting, size):
    assert resolve_group_size(setting, job(world_size=8, local_size=4)) == size


@pytest.mark.parametrize(
    ("setting", "ranks", "local", "message"),
    [
        (
            3,
            4,
            4,
            "fc_group_size=3 in a job of 4 ranks; wanted whole groups: 1, 2, 4; fix: --set fc_group_size=2",
        ),
        (8, 4, 4, "fc_group_size=8 in a job of 4 ranks; wanted whole groups: 1, 2, 4"),
        (
            2,
            1,
            1,
            "fc_group_size=2 in a job of 1 ranks; wanted whole groups: 1; fix: --set fc_group_size=1",
        ),
        (
            "node",
            5,
            3,
            "fc_group_size=node (3 ranks on gpu01) in a job of 5 ranks; wanted whole groups: 1, 5",
        ),
    ],
)
def test_a_job_of_no_whole_number_of_groups_is_refused_with_the_choices(setting, ranks, local, message):
    with pytest.raises(ConfigError) as caught:
        resolve_group_size(setting, job(world_size=ranks, local_size=local))
    assert message in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "saw"),
    [
        (["cache=disk"], "cache=disk; wanted none, ram or an absolute path"),
        (["cache="], "cache=; wanted none, ram or an absolute path"),
        (["cache_side=256"], "cache_side=256 without a cache"),
        (["cache=ram", "cache_side=200"], "cache_side=200 with crops of 224 px; wanted at least 224"),
        (["cache=ram", "cache_side=20000"], "cache_side=20000; wanted between 0 and 10000"),
        (["cache=ram", "cache_side=big"], "cache_side=big; wanted a whole number"),
    ],
)
def test_settings_of_the_cache_that_make_no_sense_are_refused(settings, saw):
    with pytest.raises(ConfigError) as caught:
        resolve(None, settings)
    assert str(caught.value).startswith(saw) and "\n" not in str(caught.value)


def test_the_side_of_cached_images_follows_the_largest_crop():
    assert resolve(None, ["cache=ram"]).cached_side() == 256
    for side in (224, 300):  # the first one is that of the crops
        assert resolve(None, ["cache=ram", f"cache_side={side}"]).cached_side() == side
    assert resolve(None, ["cache=/scratch"]).cached_side() == 0
    assert resolve(None, ["cache=ram", "image_size=[[0, 128], [1, 288], [2, 224]]"]).cached_side() == 329
