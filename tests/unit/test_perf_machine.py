"""Machine files: every one of ours is whole and sourced; bad ones are refused in one line."""

import pytest
import yaml

from horovod_owt.errors import ConfigError
from horovod_owt.perf.machine import FIGURES, load_machine, load_network, machine_names


@pytest.mark.parametrize("name", machine_names())
def test_every_figure_has_a_source(name):
    machine = load_machine(name)
    assert list(machine.figures) == list(FIGURES)
    assert not [key for key, figure in machine.figures.items() if figure.source == "no source given"]
    assert machine.about != name


def test_the_machines_of_the_documents_are_there():
    wanted = {"boston-k80", "gce-k80-8", "p2.8xlarge", "dgx-1-p100", "one-gk210", "h100-sxm"}
    assert wanted <= set(machine_names())


def changed(tmp_path, **figures):
    document = yaml.safe_load(load_machine("boston-k80").to_yaml())
    for key, value in figures.items():
        document["figures"][key] = value
        if value is None:
            del document["figures"][key]
    file = tmp_path / "machine.yaml"
    file.write_text(yaml.safe_dump(document))
    return str(file)


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        (
            {"link_gbs": {"value": 3}},
            "unknown key 'link_gbs'; wanted a key of a machine file; fix: use link_gb_s",
        ),
        ({"link_gb_s": {"valu": 3}}, "link_gb_s: unknown key 'valu'"),
        ({"link_gb_s": None}, "lacks link_gb_s"),
        ({"link_gb_s": 0}, "link_gb_s=0; wanted 0.001 to 1e+09"),
        ({"net_us": 1e300}, "net_us=1e+300; wanted 0 to 1e+09"),
        ({"conv_gflops": "fast"}, "conv_gflops=fast"),
        ({"conv_gflops": float("inf")}, "conv_gflops=inf"),
        ({"mtbf_days": {"value": True}}, "mtbf_days=True"),
        ({"overlap": 1.5}, "overlap=1.5; wanted 0 to 1"),
        ({"ranks_per_node": 2.5}, "ranks_per_node=2.5"),
    ],
)
def test_bad_figures_are_refused_in_one_line(tmp_path, figures, told):
    with pytest.raises(ConfigError) as caught:
        load_machine(changed(tmp_path, **figures))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_machine_may_have_no_published_figures_and_no_report(tmp_path):
    machine = load_machine(with_keys(tmp_path, published=None, report=None))
    assert machine.published == () and machine.report == {}


def with_keys(tmp_path, **keys):
    file = tmp_path / "machine.yaml"
    document = yaml.safe_load(load_machine("gce-k80-8").to_yaml())
    file.write_text(yaml.safe_dump({**document, **keys}))
    return str(file)


PUBLISHED = load_machine("gce-k80-8").published[0]


@pytest.mark.parametrize(
    "keys",
    [
        {"published": 3},
        {"published": [{}]},
        {"published": [PUBLISHED, PUBLISHED]},
        {"published": [PUBLISHED | {"net": "resnet50"}]},
        {"published": [PUBLISHED | {"real": {}}]},
        {"published": [PUBLISHED | {"real": {1: 0}}]},
        {"published": [PUBLISHED | {"synthetic": {"1": 656, "two": 1}}]},
        {"published": [PUBLISHED | {"overlap": "all"}]},
        {"report": "1000 epochs in 32 minutes"},
        {"report": {"epochs": 1000}},
    ],
)
def test_published_figures_and_reports_of_another_form_are_refused(tmp_path, keys):
    with pytest.raises(ConfigError, match=f"{next(iter(keys))}; wanted .*fix: leave it out"):
        load_machine(with_keys(tmp_path, **keys))


@pytest.mark.parametrize("text", ["[1]", "x: [", "", "figures: 3", "about: 2026-13-45", "[" * 3000])
def test_what_is_no_machine_file_is_refused(tmp_path, text):
    file = tmp_path / "machine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_machine(str(file))
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="fix: --machine boston-k80"):
        load_machine("bostonk80")
    with pytest.raises(ConfigError, match="fix: --network 10gbe"):
        load_network("10gb")
    assert load_network("10gbe")["net_gb_s"] == pytest.approx(1.125)
