"""Images that grow during training: the size of a step follows from the samples consumed alone."""

from types import SimpleNamespace

import pytest

from horovod_owt.config import from_mapping, resolve
from horovod_owt.errors import ConfigError
from horovod_owt.schedule import image_size
from horovod_owt.train import pipelines
from horovod_owt.train.pipelines import training_pipeline

IMAGES = 20
TABLE = "[[0, 64], [1, 80], [3, 96]]"


def config(**values):
    return resolve(None, [f"image_size={TABLE}", *(f"{key}={value}" for key, value in values.items())])


class FakePipeline:
    """Batches that are (position, size), from what a feed and a pipeline were asked for."""

    opened: list = []

    def __init__(self, position: int, batch: int, side: int) -> None:
        self._position, self._batch, self._side, self.closed = position, batch, side, False
        self.opened.append(self)

    def __next__(self):
        assert not self.closed
        position, self._position = self._position, self._position + self._batch
        return position, self._side

    def close(self) -> None:
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(FakePipeline, "opened", [])
    monkeypatch.setattr(pipelines, "TrainFeed", lambda store, **values: SimpleNamespace(**values))
    monkeypatch.setattr(
        pipelines, "_pipeline", lambda cfg, feed, world, side: FakePipeline(feed.position, feed.batch, side)
    )
    return FakePipeline.opened


def batches(cfg, *, steps: int, position: int = 0) -> list[tuple[int, int]]:
    """(position, size) of each micro-batch."""
    folder = SimpleNamespace(train=range(IMAGES))
    world = SimpleNamespace(rank=0, size=1)
    with training_pipeline(cfg, folder, world, position=position) as found:
        return [next(found) for _ in range(steps * cfg.accum_steps)]


def test_a_step_has_the_size_of_the_epoch_in_which_it_begins(opened):
    """Batches of 8 and epochs of 20: the third begins in the first epoch and ends in the second."""
    seen = batches(config(batch=8), steps=9)
    assert seen == [(0, 64), (8, 64), (16, 64), (24, 80), (32, 80), (40, 80), (48, 80), (56, 80), (64, 96)]
    assert len(opened) == 3 and all(each.closed for each in opened)


def test_the_micro_batches_of_a_step_have_one_size(opened):
    sizes = [side for _, side in batches(config(batch=4, accum_steps=2), steps=5)]
    assert sizes == [64] * 6 + [80] * 4


@pytest.mark.parametrize("step", range(1, 9))
def test_a_resumed_run_has_the_sizes_of_the_unbroken_one(opened, step):
    cfg = config(batch=8)
    assert batches(cfg, steps=9 - step, position=8 * step) == batches(cfg, steps=9)[step:]


def test_without_a_table_there_is_one_pipeline(opened):
    batches(resolve(None, ["batch=8", "image_size=80"]), steps=9)
    assert len(opened) == 1 and opened[0].closed


def test_the_table_gives_validation_its_last_size_and_survives_json():
    cfg = config()
    assert cfg.image_size == 96 and cfg.image_sizes == ((0, 64), (1, 80), (3, 96))
    assert from_mapping({**cfg.to_dict(), "image_sizes": [[0, 64], [1, 80], [3, 96]]}) == cfg
    assert [image_size(cfg.image_sizes, epoch=e, otherwise=7) for e in (0, 0.99, 1, 99)] == [64, 64, 80, 96]
    assert image_size((), epoch=1, otherwise=7) == 7


def test_a_later_size_replaces_a_recipes_table(tmp_path):
    (tmp_path / "mine.yaml").write_text("image_size:\n- [0, 64]\n- [2, 96]\n")
    mine = str(tmp_path / "mine.yaml")
    assert resolve(mine).image_sizes == ((0, 64), (2, 96))
    assert resolve(mine, ["image_size=80"]).image_sizes == ()


@pytest.mark.parametrize(
    ("setting", "saw"),
    [
        ("image_size=[[1, 64]]", "image_size starts at epoch 1; wanted a first row for epoch 0"),
        ("image_size=[[0, 64], [0, 80]]", "image_size goes from epoch 0 to epoch 0"),
        ("image_size=[[0, 62]]", "image_size has 62 px; wanted whole numbers from 63 to 8192"),
        ("image_size=[[0, 64.5]]", "image_size has 64.5 px"),
        ("image_size=[[0, 64, 1]]", r"image_size has the row \[0, 64, 1\]"),
        ("image_size=[]", "image_size is empty"),
        ("image_sizes=[[0, 64]]", "image_size=224, but image_sizes ends with 64"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(setting, saw):
    with pytest.raises(ConfigError, match=saw) as caught:
        resolve(None, [setting])
    assert "\n" not in str(caught.value)
