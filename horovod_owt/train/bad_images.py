"""The bad images that a run meets: each is named once, whichever rank met it, and then known to all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from horovod_owt.data.batch import Batch
from horovod_owt.data.faults import BadImages
from horovod_owt.data.store import Store
from horovod_owt.errors import RunError
from horovod_owt.parallel.collectives import gather_objects
from horovod_owt.parallel.runtime import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Met:
    """A bad image and the rank that met it."""

    path: str
    fault: str
    rank: int

    def __str__(self) -> str:
        return f"bad image {self.path}: {self.fault}"


class BadImageLog:
    """Those of one split."""

    def __init__(self, store: Store, world: World, record: Callable[..., None]) -> None:
        """`record` writes a line of a kind to the run's metrics, on rank 0."""
        self.known = BadImages()  # for the feeds
        self._store, self._world, self._record = store, world, record
        self._unnamed: dict[int, str] = {}

    def noting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; their bad images are to be named."""
        for batch in batches:
            for index, fault in batch.bad_images().items():
                if index not in self.known.named:
                    self._unnamed[index] = fault
            yield batch

    def name(self, step: int) -> None:
        """Tell all ranks what each has met since the last time: a warning, and a line in the metrics.

        Every rank must call it.
        """
        for image in self._gather():
            if image.rank == self._world.rank:
                log.warning("%s; it is left out", image)
            self._record_fault(image, step)

    def refuse(self, step: int, *, none_is_good: bool = False) -> RunError:
        """The error that names them and ends the run; every rank must call it, and raise it."""
        met = self._gather()
        for image in met:
            self._record_fault(image, step)
        such = f"{met[0]}" if met else "all were named before"
        if none_is_good:
            error = RunError(
                f"no image of step {step} is good: {such}",
                wanted="one at least",
                fix="see that the file system is there; `owt data verify` lists what is bad",
            )
        else:
            more = f" (and {len(met) - 1} more in step {step})" if met[1:] else ""
            fix = "replace or remove it, or --set bad_images=skip; `owt data verify` lists all that are bad"
            error = RunError(f"{such}{more}", fix=fix)
        return error.on_every_rank()

    def _record_fault(self, image: Met, step: int) -> None:
        self._record("fault", path=image.path, fault=image.fault, rank=image.rank, step=step)

    def _gather(self) -> list[Met]:
        """What ranks have met since the last time, the same on each, in the order of the files."""
        own = {index: (self._store.path(index), fault) for index, fault in self._unnamed.items()}
        met: dict[int, Met] = {}
        for rank, theirs in enumerate(gather_objects(own, "bad images")):
            for index, (path, fault) in theirs.items():
                met.setdefault(index, Met(path, fault, rank))
                self.known.add(index, fault)
        self.known.named |= met.keys()
        self._unnamed.clear()
        return [met[index] for index in sorted(met)]
