"""Pack a data set into tar shards: owt data pack."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np

from horovod_owt.data import staging
from horovod_owt.data.build import Form, Progress, make
from horovod_owt.data.listing import left_out_text
from horovod_owt.data.machine import is_of_the_file, reason_of
from horovod_owt.data.store import SPLITS, DataSet, open_data_set
from horovod_owt.data.workers import usable_cores
from horovod_owt.errors import DataError, fix_of
from horovod_owt.files import real_path

log = logging.getLogger(__name__)


def pack(
    source: Path, out: Path, form: Form, *, workers: int | None = None, progress: Progress | None = None
) -> tuple[dict, bool]:
    """Pack `source` into `out`. Returns the totals, and False if it was complete already.

    After a kill the same call continues. Raises DataError.
    """
    form.check()
    _check_apart(source, out)
    data = open_data_set(source)
    if data.left_out:
        log.warning("%s; `owt data verify` names them", left_out_text(data.left_out))
    spec = {"made_by": "owt data pack", "source_sha256": _fingerprint(data), **form.spec()}
    with staging.opened(out, spec) as place:
        if done := place.finished:
            return done, False
        stores = {split: getattr(data, split) for split in SPLITS}
        return make(place, stores, form, workers=workers or usable_cores(), progress=progress), True


def _check_apart(source: Path, out: Path) -> None:
    real_source, real_out = real_path(source), real_path(out)
    if real_source == real_out or real_source in real_out.parents or real_out in real_source.parents:
        saw = f"{out} and {source} are nested"
        saw = f"{out} is {source} itself" if real_source == real_out else saw
        raise DataError(saw, wanted="two separate folders", fix="choose another OUT")


def _fingerprint(data: DataSet) -> str:
    """Changes when an image is added, removed, renamed or written again."""
    digest = hashlib.sha256()
    for store in (data.train, data.val):
        digest.update(os.fsencode("\0".join(store.classes)) + b"\0\0")
        digest.update(np.ascontiguousarray(store.labels))
        for index in range(len(store)):
            digest.update(store.name(index) + b"\0")
        try:
            for column in store.sizes_and_times():
                digest.update(np.ascontiguousarray(column, np.int64))
        except OSError as error:
            path = os.fsdecode(error.filename) if error.filename else store.path(0)
            fix = "restore or remove the file" if is_of_the_file(error) else fix_of(error)
            raise DataError(f"cannot read {path}: {reason_of(error)}", fix=fix) from error
    return digest.hexdigest()
