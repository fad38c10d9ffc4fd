"""A job as an sbatch script: what slurm/*.sbatch are, and what `owt job submit` hands to sbatch."""

from __future__ import annotations

import shlex
from importlib import resources

import jinja2

from horovod_owt.slurm.spec import AUTO, KINDS, JobSpec


def render(spec: JobSpec) -> str:
    """The script; each word that a user gave arrives as the same word, whatever it holds."""
    template = jinja2.Template(
        resources.files("horovod_owt.slurm").joinpath("job.sbatch.j2").read_text(),
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
    """What the batch script becomes; the words given to sbatch after the script's name follow."""
    argv = ["owt", "job", "run"]
    if spec.elastic:
        argv += ["--elastic"]
    if spec.min_ranks:
        argv += ["--min-ranks", str(spec.min_ranks)]
    if spec.launcher != AUTO:
        argv += ["--launcher", spec.launcher]
    if spec.restarts and spec.max_restarts != JobSpec.max_restarts:
        argv += ["--max-restarts", str(spec.max_restarts)]
    if spec.container_image:
        argv += ["--container-image", spec.container_image]
    if spec.apptainer:
        argv += ["--apptainer", spec.apptainer]
    return [*argv, "--", *KINDS[spec.kind], *spec.owt_args]


def quote_directive(option: str) -> str:
    """`--name=value` for a #SBATCH line: sbatch takes quotes and backslashes there, and expands nothing."""
    name, equals, value = option.partition("=")
    if value in ("", shlex.quote(value)):  # nothing to quote, as in nearly all
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'
