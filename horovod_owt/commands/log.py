"""Logging of a command, to stderr."""

from __future__ import annotations

import logging

import click

from horovod_owt.logs import FORMATS, PACKAGE, TEXT, formatter

LOG_FORMAT_OPTION = click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default=TEXT,
    show_default=True,
    help="json: each log line on stderr is an object with time, level, rank, host, message.",
)


def log_to_stderr(log_format: str = TEXT) -> None:
    """Send the package's log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format))
    logger = logging.getLogger(PACKAGE)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
