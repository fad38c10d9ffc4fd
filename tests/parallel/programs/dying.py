"""narrow.py whose rank 0 dies in the phase OWT_TEST_DIES_IN; once, then the file OWT_TEST_DIED is there."""

import os
import signal
from pathlib import Path

import horovod.torch as hvd
from narrow import main

from horovod_owt.train import loop

died = Path(os.environ["OWT_TEST_DIED"])


def die_in(phase: str) -> None:
    if phase == os.environ["OWT_TEST_DIES_IN"] and hvd.rank() == 0 and not died.exists():
        died.touch()
        signal.raise_signal(signal.SIGKILL)


validate, finish_writing = loop.validate, loop.Run._finish_writing


def dying_validate(*words, **options):
    score = validate(*words, **options)
    die_in("validation")
    return score


def dying_finish_writing(run):
    die_in("last checkpoint")
    finish_writing(run)


loop.validate, loop.Run._finish_writing = dying_validate, dying_finish_writing
main()
