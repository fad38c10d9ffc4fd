"""Iterators that run ahead of their consumer: by a thread, or when the consumer asks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetched(Generic[Item]):
    """Keeps up to `depth` items of `source` ready. The consumer gets the source's exceptions in order.

    close() returns promptly in any state: a waiting consumer gets the end, a waiting thread stops.
    """

    def __init__(self, source: Iterator[Item], depth: int, name: str) -> None:
        self._source, self._depth = source, depth
        self._ready: deque[tuple[bool, Item | BaseException]] = deque()  # (failed or ended, what)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetched[Item]:
        return self

    def __next__(self) -> Item:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            if not self._ready:
                raise StopIteration
            last, item = self._ready[0]
            if last:  # stays in the queue, so that every later call raises it too
                raise item
            self._ready.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout=10)  # a read that hangs on a dead file server is abandoned

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(False, item):
                    return
            self._put(True, StopIteration())
        except BaseException as error:
            self._put(True, error)

    def _put(self, last: bool, item: Item | BaseException) -> bool:
        """False if closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            if not self._closed:
                self._ready.append((last, item))
                self._changed.notify_all()
            return not self._closed


class FetchedEarly(Generic[Item]):
    """An iterator whose consumer may fetch an item before it takes it; an exception waits until then.

    Without `early`, `fetch` does nothing.
    """

    def __init__(self, source: Iterator[Item], *, early: bool = True) -> None:
        self._source, self._early = source, early
        self._fetched: tuple[Item | None, Exception | None] | None = None

    def fetch(self) -> None:
        if self._early:
            self._fetch()

    def _fetch(self) -> None:
        if self._fetched is None:
            try:
                self._fetched = next(self._source), None
            except Exception as error:
                self._fetched = None, error

    def __iter__(self) -> FetchedEarly[Item]:
        return self

    def __next__(self) -> Item:
        self._fetch()
        (item, error), self._fetched = self._fetched, None
        if error is not None:
            raise error
        return item
