"""Bad images of a run: each is reported once, by the rank that read it, and announced to all ranks."""

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
class BadImage:
    """A bad image and the rank that read it."""

    path: str
    fault: str
    rank: int

    def __str__(self) -> str:
        return f"bad image {self.path}: {self.fault}"


class BadImageLog:
    """The bad images of one split."""

    def __init__(
        self, store: Store, world: World, record: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        """`record` writes a line to the run's metrics on rank 0."""
        self.known = BadImages()  # for the feeds
        self._store, self._world, self._record = store, world, record
        self._unnamed: dict[int, str] = {}

    def collect(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches through, and collect their bad images."""
        for batch in batches:
            for index, fault in batch.bad_images().items():
                if index not in self.known.named:
                    self._unnamed[index] = fault
            yield batch

    def announce(self, step: int | None = None) -> None:
        """Announce the new bad images to all ranks: a warning, and a line in the metrics.

        Every rank must call it.
        """
        for image in self._gather():
            if image.rank == self._world.rank:
                log.warning("%s; skipped", image)
            self._record_fault(image, step)

    def fatal_error(self, step: int | None = None, *, none_is_good: bool = False) -> RunError:
        """The error that names the new bad images; every rank must call this and raise the result."""
        images = self._gather()
        for image in images:
            self._record_fault(image, step)
        first = f"{images[0]}" if images else "all were reported before"
        in_step = "" if step is None else f" in step {step}"
        if none_is_good:
            error = RunError(
                f"no good image{in_step}: {first}",
                wanted="at least one",
                fix="check that the file system is mounted; `owt data verify` lists bad images",
            )
        else:
            more = f" (and {len(images) - 1} more{in_step})" if images[1:] else ""
            fix = "replace or remove it, or --set bad_images=skip; `owt data verify` lists all bad images"
            error = RunError(f"{first}{more}", fix=fix)
        return error.on_every_rank()

    def _record_fault(self, image: BadImage, step: int | None) -> None:
        if self._record is not None:
            self._record("fault", path=image.path, fault=image.fault, rank=image.rank, step=step)

    def _gather(self) -> list[BadImage]:
        """The bad images that any rank has read since the last call, in file order; the same on all ranks."""
        own = {index: (self._store.path(index), fault) for index, fault in self._unnamed.items()}
        found: dict[int, BadImage] = {}
        for rank, theirs in enumerate(gather_objects(own, "bad images")):
            for index, (path, fault) in theirs.items():
                found.setdefault(index, BadImage(path, fault, rank))
                self.known.add(index, fault)
        self.known.named |= found.keys()
        self._unnamed.clear()
        return [found[index] for index in sorted(found)]
