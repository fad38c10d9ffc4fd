"""Recipes: tables by epoch, what is refused in them, and what `owt recipe` prints."""

import json

import pytest
import yaml
from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.config import resolve
from horovod_owt.errors import ConfigError
from horovod_owt.recipe import ABOUT, built_in_recipes, load_recipe, recipe_names
from horovod_owt.schedule import new_row, weight_decay


def recipe(*words: str) -> str:
    result = CliRunner().invoke(cli, ["recipe", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


TORCH7 = {1: (1e-2, 5e-4), 19: (5e-3, 5e-4), 30: (1e-3, 0), 44: (5e-4, 0), 53: (1e-4, 0)}


def test_the_table_of_torch7_is_that_of_its_program():
    cfg = resolve("torch7-55")
    assert {epoch: (lr, decay) for epoch, lr, decay in cfg.schedule} == TORCH7
    assert cfg.peak_lr(world_size=1) == 1e-2
    decays = [weight_decay(cfg.schedule, epoch=epoch, otherwise=7.0) for epoch in (0, 28.99, 29, 54)]
    assert decays == [5e-4, 5e-4, 0, 0]
    assert weight_decay("cosine", epoch=3, otherwise=7.0) == 7.0
    assert weight_decay(((1, 0.1),), epoch=3, otherwise=7.0) == 7.0


def test_the_row_changes_in_the_step_that_reaches_the_epoch():
    table = resolve("torch7-55").schedule
    assert not new_row(table, 17.9, 17.99) and not new_row(table, 18, 18.01)
    assert new_row(table, 17.99, 18) and new_row(table, 17.99, 18.02)


def test_every_recipe_says_where_it_is_from_and_that_it_was_not_run_on_imagenet():
    for each in built_in_recipes():
        assert each.about["source"] and each.about["error_source"] and each.about["global_batch"] > 0
        assert each.about["run_on_imagenet"] is False
        assert set(each.about) <= set(ABOUT)


def test_list_has_all_recipes_with_their_published_errors():
    rows = {line.split()[0]: line for line in recipe("list").splitlines()}
    assert list(rows) == ["recipe", *recipe_names()]
    assert "42.5" in rows["torch7-55"] and "43.478" in rows["torchvision-90"]
    document = json.loads(recipe("list", "--json"))
    assert [each["name"] for each in document["recipes"]] == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_show_prints_a_file_that_is_the_same_recipe(name, tmp_path):
    (tmp_path / "mine.yaml").write_text(recipe("show", name))
    assert resolve(str(tmp_path / "mine.yaml")) == resolve(name)
    shown = json.loads(recipe("show", str(tmp_path / "mine.yaml"), "--json"))
    assert shown["about"] == yaml.safe_load(recipe("show", name))["about"]
    assert shown["config"]["epochs"] == resolve(name).epochs


@pytest.mark.parametrize(
    ("table", "saw", "fix"),
    [
        ("[[2, 0.1]]", "schedule starts at epoch 2; wanted a first row for epoch 1", "schedule=[[1, ...]"),
        ("[[0, 0.1]]", "schedule starts at epoch 0", ""),
        ("[]", "schedule is empty", ""),
        ("[[1, 0.1], [30, 0.01], [19, 0.02]]", "schedule goes from epoch 30 to epoch 19", "sort the rows"),
        ("[[1, 0.1], [30, 0.01], [30, 0.02]]", "schedule goes from epoch 30 to epoch 30", ""),
        ("[[1, 0.1], [30, 0.01, 0]]", "with and without a weight decay", ""),
        ("[[1]]", "schedule has the row [1]; wanted [EPOCH, LR] or", ""),
        ("[[1, x]]", "schedule has the row [1, 'x']", ""),
        ("[[1.5, 0.1]]", "schedule has the row [1.5, 0.1]", ""),
        ("[[1, .inf]]", "schedule has the row [1, inf]", ""),
        ("[[1, true]]", "schedule has the row [1, True]", ""),
        ("[1, 2]", "schedule has the row 1", ""),
        ("[[1, -0.1]]", "out of range; wanted 0 to", ""),
        ("[[1, 0]]", "no learning rate above 0", ""),
        ("[[1, 0.1]", "schedule is not a list of rows", ""),
        ("[1]: 2", "schedule is not a list of rows", ""),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_bad_table_is_refused_in_one_line(table, saw, fix, in_file, tmp_path):
    if in_file:
        (tmp_path / "bad.yaml").write_text(f"schedule: '{table.replace(chr(39), chr(34))}'")
    with pytest.raises(ConfigError) as caught:
        resolve(str(tmp_path / "bad.yaml")) if in_file else resolve(None, [f"schedule={table}"])
    message = str(caught.value)
    assert saw in message and fix in message and "\n" not in message


def test_a_table_is_the_only_source_of_its_rates(tmp_path):
    three = "schedule=[[1, 0.1, 0]]"
    for recipe_name, settings in (
        ("torch7-55", ["lr=0.2"]),
        ("torch7-55", ["weight_decay=0"]),
        (None, [three, "lr=0.2"]),
    ):
        with pytest.raises(ConfigError, match="beside a schedule table"):
            resolve(recipe_name, settings)
    assert resolve(None, ["schedule=[[1, 0.1]]", "weight_decay=0.25"]).weight_decay == 0.25
    assert resolve(None, [three]).peak_lr(2) == pytest.approx(0.1)  # over the recipe's own lr
    assert resolve("torch7-55", ["schedule=cosine", "lr=0.2", "momentum_reset=false"]).lr == 0.2
    (tmp_path / "both.yaml").write_text("lr: 0.2\nschedule: [[1, 0.1]]\n")
    with pytest.raises(ConfigError, match="lr=0.2 beside a schedule table"):
        resolve(str(tmp_path / "both.yaml"))


@pytest.mark.parametrize(
    ("text", "saw"),
    [
        ("about: {sumary: x}", "unknown key 'sumary' in about .*; fix: use summary"),
        ("about: [x]", "about of recipe .* wanted key: value lines"),
        ("momentum_reset: true", "momentum_reset=true with schedule=step:30:0.1"),
        ("momentun: 0.9", "unknown key 'momentun'; .*; fix: use momentum"),
    ],
)
def test_bad_keys_are_refused_with_the_nearest_name(text, saw, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=saw):
        resolve(str(tmp_path / "bad.yaml"))


def test_a_date_in_about_is_text_in_json(tmp_path):
    (tmp_path / "mine.yaml").write_text("about: {source: 2014-04-23}")
    shown = json.loads(recipe("show", str(tmp_path / "mine.yaml"), "--json"))
    assert shown["about"] == {"source": "2014-04-23"}


def test_an_own_recipe_needs_no_about(tmp_path):
    (tmp_path / "mine.yaml").write_text("batch: 7")
    assert load_recipe(str(tmp_path / "mine.yaml")).about == {}
    assert json.loads(recipe("show", str(tmp_path / "mine.yaml"), "--json"))["config"]["batch"] == 7
