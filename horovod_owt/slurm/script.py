"""Render a job as an sbatch script: slurm/*.sbatch, and what `owt job submit` submits."""

from __future__ import annotations

import shlex
from importlib import resources

import jinja2

from horovod_owt.slurm.spec import AUTO, KINDS, JobSpec


def render(spec: JobSpec) -> str:
    """The script; every word from the user is quoted, so that it arrives unchanged."""
    template = jinja2.Template(
        resources.files("horovod_owt.slurm").joinpath("job.sbatch.j2").read_text(encoding="utf-8"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return template.render(
        spec=spec,
        directives=[quote_directive(option) for option in spec.sbatch_options()],
        modules=shlex.join(spec.modules),
        activate=shlex.quote(f"{spec.venv}/bin/activate"),
        launch=shlex.join(launch_argv(spec)),
    )


def launch_argv(spec: JobSpec) -> list[str]:
    """The command that the script execs; arguments given to sbatch after the script name are appended."""
    argv = ["owt", "job", "run"]
    if spec.elastic:
        argv += ["--elastic"]
    if spec.min_ranks:
        argv += ["--min-ranks", str(spec.min_ranks)]
    if spec.launcher != AUTO:
        argv += ["--launcher", spec.launcher]
    if spec.interface:
        argv += ["--interface", spec.interface]
    if spec.restarts and spec.max_restarts != JobSpec.max_restarts:
        argv += ["--max-restarts", str(spec.max_restarts)]
    if spec.container_image:
        argv += ["--container-image", spec.container_image]
    if spec.apptainer:
        argv += ["--apptainer", spec.apptainer]
    if spec.container_mounts:
        argv += ["--container-mounts", spec.container_mounts]
    return [*argv, "--", *KINDS[spec.kind], *spec.owt_args]


def quote_directive(option: str) -> str:
    """`--name=value` for a #SBATCH line, where sbatch interprets quotes and backslashes only."""
    name, equals, value = option.partition("=")
    if value in ("", shlex.quote(value)):  # nothing to quote, the usual case
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'
