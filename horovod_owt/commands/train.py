"""owt train: one rank of training."""

from __future__ import annotations

import os
from pathlib import Path

import click

from horovod_owt.commands.loading import loading
from horovod_owt.commands.log import LOG_FORMAT_OPTION, log_to_stderr
from horovod_owt.commands.options import (
    PARALLEL_OPTION,
    RECIPE_OPTION,
    SET_OPTION,
    UsersPath,
    with_parallel,
    with_profile,
)


@click.command()
@click.argument("data", type=UsersPath())
@click.option("--run-dir", type=UsersPath(), help="Run folder.  [default: runs/MODEL-DATE-TIME]")
@RECIPE_OPTION
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: from the run folder's newest valid checkpoint, if it has one. PATH: start from that "
    "checkpoint. never: start from initial weights. A restarted job resumes in any case.",
)
@click.option("--other-data", is_flag=True, help="Allow resuming on another data set than the checkpoint's.")
@PARALLEL_OPTION
@click.option(
    "--profile",
    type=int,
    metavar="STEPS",
    help="Profile this many steps on every rank, after the first five: RUN/profile/rank-0000.json.gz for "
    "Perfetto, and a table of the ten most expensive operations.",
)
@click.option(
    "--timeline",
    "--horovod-timeline",
    "timeline",
    is_flag=True,
    help="Write Horovod's timeline of all collectives to RUN/timeline, for Perfetto. Under plain "
    "horovodrun only --horovod-timeline works.",
)
@SET_OPTION
@LOG_FORMAT_OPTION
def train(
    data: Path,
    run_dir: Path | None,
    recipe: str | None,
    resume: str,
    other_data: bool,
    parallel: str | None,
    profile: int | None,
    timeline: bool,
    settings: tuple[str, ...],
    log_format: str,
) -> None:
    """Train on the images in DATA (train/CLASS/*.JPEG, val/CLASS/*.JPEG, or packed); each rank runs this.

    \b
    Examples:  owt train /data/imagenet
               horovodrun -np 4 owt train /data/imagenet --run-dir runs/first --set precision=bf16
               mpirun -np 4 owt train /data/imagenet --recipe my.yaml
               torchrun --nproc-per-node 4 --no-python owt train /data/imagenet --run-dir runs/first
               horovodrun -np 8 owt train /data/imagenet --parallel hybrid --set fc_group_size=4

    Ctrl-C, TERM, HUP, USR1, USR2 and `owt stop RUN` stop it after the current step, with a checkpoint and
    exit code 75.
    """
    log_to_stderr(log_format)
    from horovod_owt.data.machine import raise_open_file_limit
    from horovod_owt.train.prepare import prepare_request, with_cache

    raise_open_file_limit()
    # validate the input before heavy modules are loaded
    settings = with_profile(profile, timeline, with_parallel(parallel, settings))
    request = prepare_request(data, recipe, settings)

    if request.cfg.profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports a missing GPU as an error
    with loading():
        from horovod_owt.parallel.elastic import is_elastic
        from horovod_owt.runs.opening import Resume
        from horovod_owt.train.elastic import train_elastic
        from horovod_owt.train.loop import train_rank

    train_to_end = train_elastic if is_elastic() else train_rank
    with with_cache(request) as request:
        train_to_end(request, run_dir=run_dir, resume=Resume(resume, other_data))
