"""What is settled, or refused, before ranks meet."""

import pytest

from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError
from horovod_owt.train.prepare import prepare_alone


@pytest.fixture
def on_a_host_of_two_in_a_job_of_three(monkeypatch):
    place = {"RANK": 0, "SIZE": 3, "LOCAL_RANK": 0, "LOCAL_SIZE": 2, "HOSTNAME": "gpu01"}
    for name, value in place.items():
        monkeypatch.setenv(f"HOROVOD_{name}", str(value))


@pytest.fixture
def images(tmp_path):
    write_synthetic(tmp_path / "data", classes=2, train_per_class=1, val_per_class=1, size=(64, 64))
    return tmp_path / "data"


def test_data_parallel_needs_no_whole_groups(on_a_host_of_two_in_a_job_of_three, images):
    cfg = prepare_alone(images, None, ("parallel=data",)).cfg
    assert cfg.ranks_per_classifier() == 1 and cfg.fc_group_size == 1
    assert cfg.classes == 2


def test_hybrid_is_refused_where_hosts_make_no_whole_groups(on_a_host_of_two_in_a_job_of_three, images):
    with pytest.raises(ConfigError, match=r"fc_group_size=node \(2 ranks on gpu01\) in a job of 3 ranks"):
        prepare_alone(images, None, ("parallel=hybrid",))


def test_hybrid_knows_its_group_before_ranks_meet(on_a_host_of_two_in_a_job_of_three, images):
    cfg = prepare_alone(images, None, ("parallel=hybrid", "fc_group_size=all")).cfg
    assert cfg.fc_group_size == 3
