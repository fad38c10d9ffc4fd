"""owt report's page of a run folder, and its command."""

from pathlib import Path

from click.testing import CliRunner

from horovod_owt.cli import cli
from horovod_owt.report.render import page
from horovod_owt.report.summary import summarize

POINTS = 1200


def html_of(summaries, points=POINTS):
    return page(summaries, max_points=points, folder=Path())


def summary(folder, points=POINTS):
    return summarize(folder, max_points=points)


def report(*words):
    return CliRunner().invoke(cli, ["report", *map(str, words)])
