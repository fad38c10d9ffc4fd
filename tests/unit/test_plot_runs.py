"""owt plot: figures of runs for papers, with the numbers of the records."""

import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from click.testing import CliRunner
from written_runs import WrittenRun, eventful_run

from horovod_owt.cli import cli
from horovod_owt.errors import ConfigError
from horovod_owt.report import plot as plots

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    eventful_run(root / "first")
    second = WrittenRun(root / "second", seed=1)
    second.start(["a"])
    second.steps(60)
    return [root / "first", root / "second"]


def plot(*words):
    return CliRunner().invoke(cli, ["plot", *map(str, words)])


def drawn(figure, panel):
    """x and y of each line of a panel, by its label."""
    axes = figure.axes[panel]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: saved.append(figure))
    return saved


def test_lines_have_the_numbers_of_the_records(runs, tmp_path, figures):
    done = plot(*runs, "--out", tmp_path / "x.svg", "--over", "step", "--what", "loss", "--what", "accuracy")
    assert done.exit_code == 0, done.output
    loss = drawn(figures[0], 0)
    assert loss["first"][0] == list(range(1, 301)) and loss["second"][0] == list(range(1, 61))
    kept = {}
    for segment in plots.curves(plots.history_of(runs[0]), 10_000)["segments"]:
        kept |= dict(zip(segment["step"], segment["loss"], strict=True))  # later starts come later
    assert loss["first"][1] == [kept[step] for step in range(1, 301)]
    accuracy = drawn(figures[0], 1)
    assert accuracy["first, top-1"] == ([50, 100, 150, 200, 250, 300], [36.6, 59.8, 74.4, 83.8, 89.6, 93.4])


def test_runs_of_the_same_name_are_told_apart(runs, tmp_path, figures):
    for root in ("a", "b"):
        (tmp_path / root).mkdir()
        (tmp_path / root / "first").symlink_to(runs[0])
    both = [tmp_path / "a" / "first", tmp_path / "b" / "first"]
    plot(*both, "--out", tmp_path / "x.svg", "--what", "loss")
    assert list(drawn(figures[0], 0)) == [str(each) for each in both]


def test_any_name_of_a_folder_is_in_the_legend(runs, tmp_path):
    names = ["_base", "lr$0.1$x_{", "$"]
    for name in names:
        shutil.copytree(runs[1], tmp_path / name)
    done = plot(*(tmp_path / name for name in names), "--out", tmp_path / "x.svg", "--what", "loss")
    assert done.exit_code == 0, done.exception
    tree = ElementTree.parse(tmp_path / "x.svg")
    shown = {
        "".join(element.itertext()).strip().strip("\u200b")
        for element in tree.iter()
        if "text" in element.tag
    }
    assert set(names) <= shown, shown


def test_time_is_in_hours(runs, tmp_path, figures):
    plot(runs[0], "--out", tmp_path / "x.svg", "--over", "time", "--what", "throughput")
    hours, _ = drawn(figures[0], 0)["first"]
    assert hours[-1] == pytest.approx(475 / 3600, rel=0.02) and figures[0].axes[0].get_xlabel() == "hours"


def test_many_steps_are_a_line_in_a_band(runs, tmp_path, figures, monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 20)
    plot(runs[0], "--out", tmp_path / "x.svg", "--what", "loss")
    assert len(drawn(figures[0], 0)["first"][0]) < 30 and len(figures[0].axes[0].collections) == 1


@pytest.mark.parametrize("suffix", ["svg", "pdf", "png"])
def test_a_figure_is_written_in_each_format(runs, tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    assert plot(runs[1], "--out", file, "--log").stdout == f"{file}\n"
    assert file.stat().st_size > 1000
    if suffix == "svg":
        texts = {element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")}
        assert {"training loss", "validation accuracy, %", "epoch"} <= texts
        first = file.read_bytes()
        plot(runs[1], "--out", file, "--log")
        assert file.read_bytes() == first


@pytest.mark.filterwarnings("error:No artists")
def test_a_run_that_lacks_a_curve_has_no_line(runs, tmp_path, figures):
    assert plot(runs[1], "--out", tmp_path / "x.svg", "--what", "gradient").exit_code == 0
    assert drawn(figures[0], 0) == {}
    young = WrittenRun(tmp_path / "young")
    young.start(["a"])
    young.steps(3)
    done = plot(tmp_path / "young", "--out", tmp_path / "x.svg", "--what", "accuracy")
    assert done.exit_code == 0 and drawn(figures[1], 0) == {}


@pytest.mark.parametrize(
    ("out", "saw"), [("x.gif", "wanted a name that ends in .svg"), ("no/x.svg", "no folder")]
)
def test_a_file_that_cannot_be_drawn_is_one_line(runs, tmp_path, out, saw):
    error = plot(runs[0], "--out", tmp_path / out).exception
    assert isinstance(error, ConfigError) and saw in str(error)
    assert "does not exist" in str(plot(tmp_path / "none", "--out", tmp_path / "x.svg").exception)


def test_without_matplotlib_the_extra_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = plot(runs[0], "--out", tmp_path / "x.svg").exception
    assert "pip install 'horovod_owt[plots]'" in str(error)
