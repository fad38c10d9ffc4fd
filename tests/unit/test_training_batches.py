"""The keys of a configuration that say what training batches are reach those that make them."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.data.store import open_data_set
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.parallel.runtime import World
from horovod_owt.train import pipelines
from horovod_owt.train.pipelines import training_pipeline, validation_pipeline

pytestmark = pytest.mark.timeout(60)

WORLD = World(0, 1, 0, 1, "here", torch.device("cpu"), 5)
SIDE = 60  # px, of all images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    write_synthetic(root, classes=2, train_per_class=20, val_per_class=1, size=(SIDE, SIDE), workers=1)
    return open_data_set(root)


@pytest.fixture(autouse=True)
def not_decoded(monkeypatch):
    """In place of a pipeline what it is asked for: its feed's first batch, and its options."""

    def make_pipeline(kind, feed, **options):
        with feed:
            (batch,) = islice(feed, 1)
        return SimpleNamespace(kind=kind, batch=batch, **options)

    monkeypatch.setattr(pipelines, "make_pipeline", make_pipeline)


def asked(data, **keys):
    return training_pipeline(TrainConfig(batch=32, **keys), data, WORLD)


def test_the_seed_orders_the_images(data):
    orders = [asked(data, seed=seed).batch.indices.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_the_least_share_of_a_crop_is_kept_to(data):
    for least in (0.08, 0.6):
        windows = asked(data, crop_scale_min=least).batch.windows
        smallest = (windows[:, 2] * windows[:, 3]).min() / SIDE**2
        assert 0.9 * least < smallest < least + 0.25


def test_threads_that_decode_are_those_of_the_rank_or_as_many_as_asked_for(data):
    assert [asked(data, decode_threads=threads).num_threads for threads in (0, 3)] == [5, 3]
    cfg = TrainConfig(decode_threads=3, image_size=80, pipeline="dali")
    validation = validation_pipeline(cfg, data.val, WORLD)
    assert (validation.num_threads, validation.image_size, validation.kind) == (3, 80, "dali")
