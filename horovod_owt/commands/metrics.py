"""owt metrics: what Prometheus and Grafana need to watch runs."""

from __future__ import annotations

from importlib import resources

import click


@click.group()
def metrics() -> None:
    """Alert rules for Prometheus and a dashboard for Grafana.

    A run serves its metrics with `--set metrics_port=9400`.
    """


@metrics.command()
def rules() -> None:
    """Print alert rules.

    \b
    Example:  owt metrics rules > /etc/prometheus/horovod_owt.yml    # and name it under rule_files
    """
    click.echo(_file("alerts.yml"), nl=False)


@metrics.command()
def dashboard() -> None:
    """Print a dashboard as JSON.

    \b
    Example:  owt metrics dashboard > horovod_owt.json    # in Grafana: Dashboards, New, Import
    """
    click.echo(_file("dashboard.json"), nl=False)


def _file(name: str) -> str:
    return (resources.files("horovod_owt") / "monitoring" / name).read_text(encoding="utf-8")
