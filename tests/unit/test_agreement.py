"""The table of who has what."""

import pytest
import torch

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.parallel.device import Device
from horovod_owt.parallel.runtime import World
from horovod_owt.train import agreement
from horovod_owt.train.agreement import check_agreement, differences
from horovod_owt.versions import code_digest


def test_what_all_have_is_not_in_it():
    assert differences([("h0", {"version torch": "2"}), ("h1", {"version torch": "2"})]) == []


def test_each_value_has_its_ranks_and_a_missing_one_is_none():
    everyone = [(f"h{rank // 2}", {"version torch": "2", "version dali": "1"}) for rank in range(6)]
    everyone[3][1]["version torch"] = "3"
    del everyone[5][1]["version dali"]
    assert differences(everyone) == [
        "version torch  2: ranks 0 (h0), 1 (h0), 2 (h1), 4 (h2) and 1 more",
        "               3: rank 3 (h1)",
        "version dali  1: ranks 0 (h0), 1 (h0), 2 (h1), 3 (h1) and 1 more",
        "              none: rank 5 (h2)",
    ]


def test_the_code_digest_sees_content_names_and_recipes(tmp_path):
    seen = set()
    for name, text in (("a.py", "x"), ("a.py", "y"), ("b.py", "y"), ("c.yaml", "y"), ("c.yaml", "z")):
        (tmp_path / name).write_text(text)
        seen.add(code_digest(tmp_path))
    (tmp_path / "note.txt").write_text("not code")
    seen.add(code_digest(tmp_path))
    assert len(seen) == 5


@pytest.mark.parametrize("odd", [(), (3,)])
def test_all_facts_of_all_ranks_travel_only_if_some_differ(monkeypatch, odd):
    """They are 3 kB a rank, and every rank would get those of all ranks."""
    device, world = Device("cpu"), World(1, 4, 1, 4, "h0", torch.device("cpu"), 1)
    own = agreement.facts(TrainConfig(), "50 images", device)
    gathered = []

    def gather(value, name):
        gathered.append(name)
        return [("h0", own | ({"data set": "49 images"} if rank in odd else {})) for rank in range(4)]

    monkeypatch.setattr(agreement, "broadcast_object", lambda value, name: own)
    monkeypatch.setattr(agreement, "sum_over_ranks", lambda values, name: values + len(odd))
    monkeypatch.setattr(agreement, "gather_objects", gather)
    monkeypatch.setattr(agreement.runtime, "check_devices", lambda device, world: None)
    if odd:
        with pytest.raises(ConfigError, match="data set  50 images: ranks 0 .h0., 1 .h0."):
            check_agreement(TrainConfig(), "50 images", device, world)
    else:
        check_agreement(TrainConfig(), "50 images", device, world)
    assert gathered == ["agreement"] * len(odd)
