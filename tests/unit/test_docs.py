"""The documents: pictures are those that the scripts draw, and the reference has every configuration key."""

import importlib
from pathlib import Path

import pytest

from horovod_owt.config import FIELDS, TrainConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def docs_module(monkeypatch):
    """Import a module of docs/, as Sphinx does."""
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module


@pytest.mark.parametrize("name", ["hybrid", "architecture", "schedules"])
def test_a_picture_is_what_its_script_draws(docs_module, name):
    assert (DOCS / f"{name}.svg").read_text() == docs_module(f"draw_{name}").drawing()


def test_the_configuration_reference_explains_every_key(docs_module):
    keys = {key.name: key for key in docs_module("reference").config_keys()}
    assert list(keys) == list(FIELDS)
    assert not [name for name, key in keys.items() if not key.meaning]
    assert keys["precision"].values == "fp32 | bf16 | fp16 | fp64"
    assert keys["batch"].default == str(TrainConfig().batch)
    assert "images per rank" in keys["batch"].meaning


@pytest.mark.parametrize(
    ("plain", "rst"),
    [
        ("Reads `data/order`, all *.JPEG.", r"Reads ``data/order``, all \*.JPEG."),
        (
            "Shapes    x (b, n)\nSource    a paper",
            "::\n\n    Shapes    x (b, n)\n    Source    a paper",
        ),
        ("One.\n\n   owt info", "One.\n\n::\n\n    owt info"),
        ("`a*b` and a|b", r"``a*b`` and a\|b"),
    ],
)
def test_plain_docstrings_become_restructured_text(docs_module, plain, rst):
    assert docs_module("reference").as_rst(plain) == rst
