"""A run's configuration: where values come from, and what is refused."""

import pytest

from horovod_owt.config import DEFAULT_RECIPE, TrainConfig, from_mapping, recipe_names, resolve
from horovod_owt.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name):
    assert resolve(name).to_dict().keys() == TrainConfig().to_dict().keys()


def test_settings_overlay_the_recipe_in_their_order(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("batch: 7\nlr: 1e-3\nchannels_last: false\n")
    cfg = resolve(str(recipe), ["batch=8", "batch=9", "seed=3"])
    assert (cfg.batch, cfg.lr, cfg.channels_last, cfg.seed) == (9, 1e-3, False, 3)
    assert cfg.momentum == TrainConfig().momentum


def test_a_config_survives_json():
    cfg = resolve(DEFAULT_RECIPE, ["weight_decay=0.25"])
    assert from_mapping(cfg.to_dict()) == cfg


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
    [("batch: [", "is no YAML at line"), ("- batch", "holds a list"), ("bach: 3", "unknown key 'bach'")],
)
def test_a_bad_recipe_file_is_refused(tmp_path, text, saw):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=saw):
        resolve(str(tmp_path / "bad.yaml"))


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="fix: --recipe quickstart"):
        resolve("quikstart")


def test_learning_rate_and_steps_follow_the_global_batch():
    cfg = TrainConfig(batch=32, accum_steps=2, lr=0.1, lr_batch=256, epochs=3)
    assert cfg.global_batch(world_size=8) == 512
    assert cfg.peak_lr(world_size=8) == pytest.approx(0.2)
