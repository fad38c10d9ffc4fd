"""Values between ranks: what goes in comes out, and nothing but data comes in."""

import dataclasses
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError, OwtError, Preempted, RunError
from horovod_owt.parallel.admission import Endpoint
from horovod_owt.parallel.elastic import Commit
from horovod_owt.parallel.objects import from_json, to_json
from horovod_owt.parallel.rendezvous import Address
from horovod_owt.runs.opening import Opened


class Name(NamedTuple):
    strategy: str
    ranks: int


def sent(value, kind=None):
    return from_json(to_json(value), kind)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**63),
        2**64 - 1,
        0.1 + 0.2,
        math.inf,
        -0.0,
        5e-324,
        "text \u20ac \U0001f600 \n",
        os.fsdecode(b"bytes \xff\xfe that are no text"),
        b"\x00\xff",
        Path("/runs/\udcff/x y"),
        (),
        ("host", ("nested", [1, (2,)])),
        [],
        {},
        {"a": {"b": [None, False]}},
        {3: ("path", "fault"), -1: ()},
        {("data", 2): [[0.5]], "text": 1, None: 2, 1.5: 3},
        {"=": 1},
        {"=": ["tuple", [1]]},
        {"=": {"=": ["path", "/"]}},
        ["=", "tuple"],
    ],
    ids=repr,
)
def test_a_value_arrives_as_it_was_sent(value):
    assert repr(sent(value)) == repr(value)


def test_a_number_that_is_none_arrives():
    assert math.isnan(sent({"loss": math.nan})["loss"])


def test_numbers_of_numpy_arrive_as_pythons():
    made = sent([np.int64(2**62), np.float64(0.1), np.float32(0.5)])
    assert made == [2**62, 0.1, 0.5] and [type(each) for each in made] == [int, float, float]


def test_a_named_tuple_is_equal_to_what_arrives():
    assert sent({Name("data", 2): [1.0]})[Name("data", 2)] == [1.0]


@pytest.mark.parametrize(
    "value",
    [
        TrainConfig(lr=0.1 + 0.2, fc_group_size=2, max_steps=10**9),
        TrainConfig(),
        Opened(Path("/r"), None, "x"),
        Opened(Path("/r\udcff"), Path("/r/c"), ""),
        Address("key", (Endpoint("::1", 4711), Endpoint("10.0.0.1", 1)), "host"),
        Commit(7, 2**40, {"scale": 65536.0, "growth": 3}, Path("/r"), 512, "begun"),
    ],
)
def test_a_dataclass_arrives_where_its_class_is_named(value):
    assert sent(value, type(value)) == value
    assert sent((value, {"a": value}), type(value)) == (value, {"a": value})
    with pytest.raises(ValueError, match="dataclass"):
        sent(value)


@pytest.mark.parametrize("kind", [ConfigError, RunError, Preempted, OwtError])
def test_an_error_arrives_with_class_and_words(kind):
    class Special(kind):
        pass

    for made in (sent(kind("saw", wanted="w", fix="f")), sent(Special("saw", wanted="w", fix="f"))):
        assert type(made) is kind and (made.saw, made.wanted, made.fix) == ("saw", "w", "f")


@pytest.mark.parametrize("value", [object(), {1, 2}, len, TrainConfig, np.zeros(2), 1j])
def test_what_does_not_travel_is_refused_where_it_is_sent(value):
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        to_json(value)


@pytest.mark.parametrize(
    "content",
    [
        ["error", ["SystemExit", "", "", ""]],
        ["error", ["annotations", "", "", ""]],
        ["error", ["PrintedBy", "", "", ""]],
        ["error", ["OwtError"]],
        ["dataclass", {"harm": 1}],
        ["dataclass", [1]],
        ["call", ["os.mkdir", ["/tmp/x"]]],
        ["bytes", "xyz"],
        ["bytes", 3],
        ["path", 3],
        ["dict", [[1]]],
        ["dict", [[[], 1]]],
        ["tuple"],
        [],
        None,
        "tuple",
    ],
    ids=repr,
)
def test_what_nobody_sends_is_refused_where_it_arrives(content):
    with pytest.raises(ValueError):
        from_json(json.dumps({"=": content}), TrainConfig)


def test_random_texts_give_values_or_a_value_error():
    draw = random.Random(5)
    good = to_json({1: (Path("/x"), b"1", TrainConfig(), ConfigError("a")), "b": [math.nan]})
    for _ in range(2000):
        text = list(good)
        for _ in range(draw.randrange(1, 6)):
            text[draw.randrange(len(text))] = chr(draw.randrange(32, 126))
        try:
            from_json("".join(text), TrainConfig)
        except (ValueError, OwtError):
            pass
    with pytest.raises(ValueError):
        from_json("[" * 100_000, None)


def test_no_code_of_ours_pickles_between_ranks():
    import horovod_owt

    for path in Path(horovod_owt.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("hvd.broadcast_object", "hvd.allgather_object", "import pickle", "cloudpickle"):
            assert word not in text, f"{path}: {word}"


def test_reading_what_arrives_imports_nothing():
    before = set(sys.modules)
    from_json(to_json(dataclasses.asdict(TrainConfig())))
    assert set(sys.modules) == before
