"""owt report: its figures are those of the records, whatever the run folder has been through."""

import base64
import html
import io
import json
import math
import os
import random
import re
from pathlib import Path
from statistics import median
from urllib.parse import unquote

import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps, ImageStat
from written_runs import WrittenRun, eventful_run

from horovod_owt.cli import cli
from horovod_owt.data.synthetic import write_synthetic
from horovod_owt.errors import ConfigError
from horovod_owt.report.render import page
from horovod_owt.report.series import curves
from horovod_owt.report.shares import PARTS
from horovod_owt.report.summary import summarize, summarize_all
from horovod_owt.runs.folder import profile_table, profile_trace, timeline_file
from horovod_owt.runs.history import read_history
from horovod_owt.runs.owner import Ownership

POINTS = 1200


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "eventful"
    eventful_run(folder)
    return folder


def html_of(summaries, points=POINTS):
    return page(summaries, max_points=points, folder=Path())


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder, points=POINTS):
    return summarize(folder, max_points=points)


def report(*words):
    return CliRunner().invoke(cli, ["report", *map(str, words)])


def test_the_figures_are_those_of_the_records(eventful):
    found = summary(eventful)
    last = {record["step"]: record for record in records_of(eventful) if record["kind"] == "step"}
    kept = [last[step] for step in sorted(last)]  # the later record of a step that was done again
    figures = found["figures"]
    assert figures["steps"] == 300 and figures["lost_steps"] == 20
    assert figures["loss"] == pytest.approx(kept[-1]["loss"], rel=1e-8)
    assert figures["images_per_s"]["median"] == pytest.approx(
        median(r["images_per_s"] for r in kept), rel=1e-8
    )
    waited = sum(r["data_wait_ms"] for r in kept) / sum(r["step_ms"] for r in kept)
    assert figures["data_wait_share"] == pytest.approx(waited)
    validations = [record for record in records_of(eventful) if record["kind"] == "validation"]
    assert [row["correct_top1"] for row in found["validations"]] == [r["correct_top1"] for r in validations]
    assert (figures["top1"], figures["best"]["step"]) == (validations[-1]["top1"], 300)
    times = [record["time"] for record in records_of(eventful)]
    assert found["ended"] == times[-1] and found["began"] == records_of(eventful)[0]["started"]
    assert found["state"] == "done" and found["changed"] == {
        "classes": 10,
        "batch": 32,
        "epochs": 6,
        "fc_group_size": 1,
    }


def test_starts_and_faults_are_told_in_order(eventful):
    found = summary(eventful)
    starts = found["starts"]
    assert [start["how"] for start in starts] == ["start", "resume", "regroup", "regroup"]
    assert [start["lost_steps"] for start in starts] == [20, 0, 0, 0]
    assert [(start["first_step"], start["last_step"]) for start in starts] == [
        (0, 70),
        (50, 130),
        (130, 190),
        (190, 300),
    ]
    assert starts[0]["end"].startswith("no outcome") and starts[1]["end"].startswith("ranks regroup: rank 2")
    assert starts[2]["hosts"] == {"node1": 2} and starts[3]["end"] == "done"
    whats = [event["what"] for event in found["events"]]
    middle = ["fault", "start", "straggler", "regroup", "start", "regroup", "start"]
    assert whats == ["start", *middle, "done"]
    times = [event["time"] for event in found["events"]]
    assert times == sorted(times) and times[0] == 0


def test_bytes_are_held_against_the_closed_form_for_each_size_of_the_job(eventful):
    groups = summary(eventful)["bytes"]
    assert [(group["world_size"], group["steps"]) for group in groups] == [(4, 260), (2, 60)]
    for group in groups:
        assert group["rows"] and all(row["sent"] == row["expected"] > 0 for row in group["rows"])


def test_bytes_that_differ_are_seen(tmp_path):
    run = WrittenRun(tmp_path)
    run.start(["a", "b"])
    run.steps(2)
    run.write("step", step=3, bytes_sent={"fc gradients": 0, "surprise": 300})
    rows = {row["what"]: row for row in summary(tmp_path)["bytes"][0]["rows"]}
    assert rows["fc gradients"]["sent"] == pytest.approx(rows["fc gradients"]["expected"] * 2 / 3)
    assert (rows["surprise"]["sent"], rows["surprise"]["expected"]) == (100, 0)
    assert "−72," in html_of([summary(tmp_path)])


def test_bad_images_are_counted_by_file(eventful):
    bad = summary(eventful)["bad_images"]
    assert bad["count"] == 2 and bad["faults"] == {"truncated": 1, "empty file": 1}
    assert bad["images"][0] == {
        "path": "/data/imagenet/train/n01440764/broken.JPEG",
        "fault": "truncated",
        "rank": 1,
        "step": 111,
    }


def test_with_few_steps_each_point_is_a_record(eventful):
    found = summary(eventful)["curves"]
    assert found["steps_per_point"] == 1
    drawn = [value for segment in found["segments"] for value in segment["loss"]]
    steps = [record for record in records_of(eventful) if record["kind"] == "step"]
    assert drawn == pytest.approx([record["loss"] for record in steps], rel=1e-8)
    assert [segment["kept"] for segment in found["segments"]] == [True, False, True, True, True]
    assert not any("loss_low" in segment for segment in found["segments"])


def test_many_steps_become_few_points_that_keep_the_extremes(eventful):
    history = read_history(eventful)
    history.steps["loss"][123] = 99.0
    found = curves(history, max_points=20)
    assert found["steps_per_point"] == 16
    points = [len(segment["step"]) for segment in found["segments"]]
    assert sum(points) <= 20 + len(points)
    assert max(value for segment in found["segments"] for value in segment["loss_high"]) == 99.0
    values = history.steps["loss"]
    first = found["segments"][0]
    assert first["loss"][0] == pytest.approx(sum(values[:16]) / 16)
    assert first["loss_low"][0] == pytest.approx(min(values[:16]))
    assert sum(len(segment["step"]) == 1 for segment in found["segments"]) == 0
    text = html_of([{**summary(eventful), "curves": found}], 20)
    assert "Each point is the mean of 16 steps" in text and "20 points or fewer" in text


def test_a_nan_loss_leaves_a_gap_and_valid_json(tmp_path):
    run = WrittenRun(tmp_path)
    run.start(["a"])
    run.steps(2)
    run.write("step", step=3, loss=math.nan, lr=math.inf)
    run.write("validation", step=3, epoch=0.1, loss=math.nan, top1=10.0)
    done = report(tmp_path, "--json")
    assert json.loads(done.stdout, parse_constant=pytest.fail)["runs"][0]["figures"]["loss"] is None
    assert summary(tmp_path)["curves"]["segments"][0]["loss"][2] is None
    assert html_of([summary(tmp_path)])


STATES = {
    "done": {"exit_code": 0, "reason": "done"},
    "stopped": {"exit_code": 75, "reason": "stopped by SIGUSR1"},
    "failed": {"exit_code": 1, "reason": "loss is nan"},
}


@pytest.mark.parametrize("state", STATES)
def test_the_state_is_that_of_the_outcome(tmp_path, state):
    run = WrittenRun(tmp_path)
    run.start(["a"])
    run.outcome(**STATES[state])
    assert summary(tmp_path)["state"] == state
    run.start(["a"])  # the outcome is no longer this start's
    os.utime(tmp_path / "outcome.json", (0, 0))
    assert summary(tmp_path)["state"] == "ended"
    with Ownership() as owner:
        owner.take(tmp_path)
        found = summary(tmp_path)
    assert found["state"] == "running" and found["reason"].startswith(f"process {os.getpid()}")
    assert summary(tmp_path)["state"] == "ended"


def test_an_outcome_that_only_its_file_has_counts(tmp_path):
    """A rank that gives up writes outcome.json, and no record."""
    WrittenRun(tmp_path).start(["a"])
    (tmp_path / "outcome.json").write_text('{"exit_code": 1, "reason": "stalled: rank 1"}')
    assert (summary(tmp_path)["state"], summary(tmp_path)["reason"]) == ("failed", "stalled: rank 1")
    (tmp_path / "outcome.json").write_text("{")
    assert "unreadable" in summary(tmp_path)["notes"][0]


def test_a_run_of_an_older_version_has_a_page(tmp_path):
    lines = [
        {"kind": "run"},
        {"kind": "step", "step": 1, "loss": 2.0},
        {"kind": "checkpoint", "step": 1},
        {"kind": "new"},
    ]
    lines += [{"kind": "validation", "step": 1}, {"kind": "fault", "fault": "x"}, {"kind": "outcome"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summary(tmp_path)
    assert found["figures"]["loss"] == 2 and found["wall_s"] == 0 and not found["has_times"]
    assert "Training loss" in html_of([found])
    run = WrittenRun(tmp_path / "unstamped", stamped=False)
    run.start(["a", "b"])
    run.steps(60)
    found = summary(tmp_path / "unstamped")
    assert found["wall_s"] == pytest.approx(1e-3 * sum(read_history(run.folder).steps["step_ms"]))
    assert "the records have no wall time" in html_of([found])


def test_damage_is_told_on_the_page(tmp_path):
    run = WrittenRun(tmp_path)
    run.start(["a"])
    run.file.write("{broken <b>\n")
    run.steps(3)
    text = html_of([summary(tmp_path)])
    assert "1 damaged line skipped, the first: &#39;{broken &lt;b&gt;&#39;" in text


@pytest.mark.parametrize(
    ("make", "saw"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text(""), "is a file"),
        (lambda folder: folder.mkdir(), "has no metrics.jsonl"),
        (lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").write_text("")), "has no records yet"),
        (lambda folder: (folder / "metrics.jsonl").mkdir(parents=True), "Is a directory"),
    ],
)
def test_a_folder_that_is_no_runs_is_one_line(tmp_path, make, saw):
    make(tmp_path / "run")
    with pytest.raises(ConfigError, match=saw) as error:
        summary(tmp_path / "run")
    assert "\n" not in str(error.value)


HOSTILE = "<script>alert(1)</script>\"'&]]>\u2028"


def test_nothing_from_a_run_folder_becomes_html(tmp_path):
    run = WrittenRun(tmp_path / f"<img src=x onerror=alert(2)>{HOSTILE}".replace("/", ""))
    run.start([HOSTILE], lane=HOSTILE)
    run.write("fault", fault=HOSTILE, step=1)
    run.write("fault", path=HOSTILE, fault=HOSTILE, rank=0, step=1)
    run.write("run", versions={HOSTILE: HOSTILE}, config={HOSTILE: HOSTILE}, hosts=[HOSTILE], data=HOSTILE)
    run.write("step", step=1, bytes_sent={HOSTILE: 1})
    run.outcome(1, HOSTILE)
    text = html_of(summarize_all([run.folder, run.folder], max_points=POINTS))
    assert len(re.findall("<script", text)) == 2 and len(re.findall("</script>", text)) == 2  # ours
    assert "<img" not in text and "alert(1)&lt;/script&gt;" in text
    document = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(document)["runs"][0]["events"][1]["text"] == HOSTILE


def test_the_page_loads_nothing_from_elsewhere(eventful):
    text = html_of([summary(eventful)])
    assert (
        not re.findall(r"""(?:src|href)=["'](?!#)""", text) and "url(" not in text and "@import" not in text
    )
    assert "default-src 'none'" in html.unescape(text) and len(text) < 200_000


def test_the_page_is_written_to_the_run_folder_or_where_asked(eventful, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(eventful).stdout == f"{eventful}/report.html\n"
    assert (eventful / "report.html").read_text().startswith("<!doctype html>")
    assert not list(eventful.glob("*.part*")) and not list(eventful.glob(".*"))
    assert report(eventful, eventful).stdout == "report.html\n"
    assert "2 runs" in (tmp_path / "report.html").read_text()
    assert report(eventful, "--output", tmp_path / "x.html").exit_code == 0
    error = report(eventful, "--output", tmp_path / "no" / "x.html").exception
    assert str(error).startswith(f"--output {tmp_path}/no/x.html: No such file or directory; wanted")


def test_where_a_step_goes_is_told_of_all_ranks_that_the_newest_record_has(tmp_path):
    run = WrittenRun(tmp_path)
    run.start(["a", "b"])
    run.steps(10, step_ms=100)
    (alone,) = summary(tmp_path)["step_shares"]
    assert (alone["rank"], alone["host"]) == (0, "a")
    assert sum(alone[part] for part in PARTS) == pytest.approx(
        sum(read_history(tmp_path).steps["step_ms"]) / 10
    )
    run.write("ranks", step=4, steps=4, compute_ms=[1, 1], data_wait_ms=[1, 1], exposed_comm_ms=[1, 1])
    run.write("ranks", step=9, steps=5, compute_ms=[90, 60], data_wait_ms=[5, 9], exposed_comm_ms=[5, 31])
    shares = summary(tmp_path)["step_shares"]
    assert [[row[part] for part in PARTS] for row in shares] == [[90, 5, 5], [60, 9, 31]]
    assert [row["host"] for row in shares] == ["a", "b"]
    assert "Rank 0 only" not in html_of([summary(tmp_path)])
    run.start(["a", "b"], first_step=10)  # whose ranks are not recorded yet
    run.steps(1)
    assert len(summary(tmp_path)["step_shares"]) == 1


def test_of_many_ranks_the_slow_ones_have_a_bar(tmp_path):
    run = WrittenRun(tmp_path)
    run.start([f"host{n:02}" for n in range(100)])
    compute = [50.0] * 100
    compute[77] = 80.0
    run.write("ranks", step=0, compute_ms=compute, data_wait_ms=[1] * 100, exposed_comm_ms=[0] * 100)
    text = html_of([summary(tmp_path)])
    assert "rank 77 " in text and text.count("compute 50 ms") == 31
    assert "The 32 slowest of 100 ranks" in text


def test_traces_are_linked_from_where_the_page_is(tmp_path):
    run = WrittenRun(tmp_path / "a run #1")
    run.start(["a"])
    for file in (profile_trace(run.folder, 0), profile_table(run.folder, 0), timeline_file(run.folder, 0)):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    assert report(run.folder, "--output", tmp_path / "page.html").exit_code == 0
    links = re.findall('href="(?!#)(.*?)"', (tmp_path / "page.html").read_text())
    assert links[0] == "./a%20run%20%231/profile/rank-0000.json.gz" and len(links) == 3
    assert all((tmp_path / unquote(link)).is_file() for link in links)


def test_goodput_is_that_of_its_own_command(eventful):
    found = summary(eventful)
    told = json.loads(CliRunner().invoke(cli, ["goodput", str(eventful), "--json"]).stdout)
    assert {key: found["goodput"][key] for key in told} == told
    assert f"{100 * told['goodput']:.1f}\N{NO-BREAK SPACE}%" in html_of([found])


@pytest.mark.parametrize("seed", range(20))
def test_records_with_values_of_other_types_still_give_a_page(tmp_path, seed):
    eventful_run(tmp_path)
    draw = random.Random(seed)
    odd = [None, "x", -1, 1.5, True, [], {}, [1], {"a": [{}]}, 10**400, "\ud800", "2026-13-01T00:00:00Z"]
    records = records_of(tmp_path)
    for record in [r for r in records if r["kind"] != "step" or draw.random() < 0.1]:
        for key in draw.sample(sorted(record), k=draw.randint(0, 3)):
            record[key] = draw.choice(odd)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = summary(tmp_path)
    json.dumps(found, allow_nan=False)
    assert html_of([found, found]).encode(errors="backslashreplace")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "data"
    write_synthetic(root, classes=2, train_per_class=1, val_per_class=2, size=(40, 60), workers=1)
    return root


def evaluation(data, **values):
    a, b = CLASSES
    rows = [{"class": a, "images": 50, "correct_top1": 30}, {"class": b, "images": 50, "correct_top1": 50}]
    pairs = [{"class": a, "taken_for": b, "images": 20}]
    scores = {"images": 100, "correct_top1": 80, "top1": 80.0, "top5": 100.0, "crops": 10}
    return json.dumps({**scores, "per_class": rows, "confused": pairs, "data": str(data), **values})


CLASSES = ("n00000000_horizontal", "n00000001_vertical")


def test_confused_classes_have_pictures_of_the_validation_set(tmp_path, images):
    WrittenRun(tmp_path).start(["a"])
    (tmp_path / "evaluation.json").write_text(evaluation(images))
    found = summary(tmp_path)["evaluation"]
    (pair,) = found["confused"]
    assert (pair["class"], pair["taken_for"], pair["share"]) == (*CLASSES, 0.4)
    for name, picture in zip(CLASSES, pair["thumbnails"], strict=True):
        first = Image.open(min((images / "val" / name).iterdir())).convert("RGB")
        shown = Image.open(io.BytesIO(base64.b64decode(picture.partition("base64,")[2])))
        assert shown.size == (96, 96)
        means = [ImageStat.Stat(image).mean for image in (ImageOps.fit(first, (96, 96)), shown)]
        assert means[0] == pytest.approx(means[1], abs=3)
    assert [row["class"] for row in found["worst"]] == [CLASSES[0]]
    text = html_of([summary(tmp_path)])
    assert (
        text.count('<img class="thumb" src="data:image/jpeg;base64,') == 2
        and "10\N{NO-BREAK SPACE}crops" in text
    )


def test_without_the_images_the_pairs_are_named(tmp_path, images):
    WrittenRun(tmp_path).start(["a"])
    (tmp_path / "evaluation.json").write_text(evaluation(tmp_path / "gone"))
    found = summary(tmp_path)["evaluation"]
    assert found["confused"][0]["images"] == 20
    assert found["no_thumbnails"] == f"No pictures: {tmp_path / 'gone'} does not exist"
    assert "classified as" in html_of([summary(tmp_path)])
    unknown = [{"class": "<b>", "taken_for": CLASSES[0], "images": 1}]
    (tmp_path / "evaluation.json").write_text(evaluation(images, confused=unknown))
    assert summary(tmp_path)["evaluation"]["confused"][0]["thumbnails"][0] is None
    assert "<b>" not in html_of([summary(tmp_path)])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"per_class": 1}', '{"per_class": [], "top1": "x"}']
)
def test_a_foreign_evaluation_is_a_note_or_where_asked_for_an_error(tmp_path, content):
    WrittenRun(tmp_path).start(["a"])
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    assert str(file) in summary(tmp_path)["notes"][0] and html_of([summary(tmp_path)])
    error = report(tmp_path, "--evaluation", file).exception
    assert isinstance(error, ConfigError) and "owt evaluate --json" in str(error)
    assert "with several runs" in str(report(tmp_path, tmp_path, "--evaluation", file).exception)


def test_runs_of_the_same_name_are_told_apart(eventful, tmp_path):
    WrittenRun(tmp_path / "eventful").start(["a"])
    names = [run["name"] for run in summarize_all([eventful, tmp_path / "eventful"], max_points=POINTS)]
    assert names == [str(eventful), str(tmp_path / "eventful")]


def test_several_runs_show_the_settings_that_differ(eventful, tmp_path):
    run = WrittenRun(tmp_path / "other", lr=0.5)
    run.start(["a"])
    run.steps(3)
    text = html_of(summarize_all([eventful, run.folder], max_points=POINTS))
    differing = text[text.index("Settings that differ") : text.index('id="training"')]
    assert re.findall(r"<code>(\w+)</code>", differing) == ["ranks", "lr"]
