"""Work on all cores, in processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_any
from typing import TypeVar

from horovod_owt.cgroups import within_quota
from horovod_owt.errors import ConfigError, RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL_S = 0.2  # between two reads of the count


class Stopped(Exception):
    """The caller has cancelled the work."""


class _Local:
    """In place of the shared count and stop event, if there is one process."""

    value = 0

    def is_set(self) -> bool:
        return False


_stop = _count = _Local()


def tick(count: int = 1) -> None:
    """Called by the work regularly: `count` more items are done. Raises Stopped."""
    if isinstance(_count, _Local):
        _count.value += count
        return
    with _count.get_lock():
        _count.value += count
    if _stop.is_set():
        raise Stopped


def in_processes(
    work: Callable[[Task], Result],
    tasks: list[Task],
    workers: int,
    *,
    begin: Callable[..., None] | None = None,
    begin_args: tuple = (),
    ticked: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """Results of `work(task)` as they become ready; `begin(*begin_args)` is called first in each process.

    `ticked(count)` gets the total of the `tick` calls. Leaving the loop early stops the processes at their
    next tick. With one worker, or one task, everything runs in this process. RunError if a process dies.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from _here(work, tasks, begin, begin_args, ticked)
        return
    # spawn: the caller may have threads.
    # An executor, not a Pool: without a __main__ guard it fails at once, where a Pool spawns for ever.
    spawn = multiprocessing.get_context("spawn")
    try:
        stop, count = spawn.Event(), spawn.Value("q", 0)
    except OSError as error:
        raise ConfigError(
            f"processes cannot share memory: {error.strerror}",
            wanted="a writable /dev/shm and temporary folder with room",
            fix="mount a larger /dev/shm (docker run --shm-size=1g), set TMPDIR, or use --workers 1",
        ) from None
    executor = ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_begin, initargs=(stop, count, begin, begin_args)
    )
    try:
        with _ctrl_c_held():
            pending = {executor.submit(work, task) for task in tasks}
        while pending:
            ready, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            if ticked:
                ticked(count.value)
            for future in ready:
                yield future.result()
    except BrokenProcessPool as error:
        fix = "if memory is short, use fewer --workers or cores (`taskset -c 0-3 owt ...`), and start again"
        raise RunError("a worker process died", fix=fix) from error
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Keep Ctrl-C until the block has ended; processes that it starts do not get it before they ignore it.

    A terminal sends Ctrl-C to all processes. One that is still starting would print a KeyboardInterrupt.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the mask is inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _here(work, tasks, begin, begin_args, ticked) -> Iterator:
    _count.value = 0
    if begin and tasks:
        begin(*begin_args)
    for task in tasks:
        result = work(task)
        if ticked:
            ticked(_count.value)
        yield result


def _begin(stop, count, begin, begin_args) -> None:
    """Initialise a worker: ignore Ctrl-C, which the parent handles, and exit when the parent dies.

    An orphaned worker of a ProcessPoolExecutor would wait for ever, because it holds both ends of its queue.
    """
    global _stop, _count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait_for_any([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True, name="end-with-parent").start()
    _stop, _count = stop, count
    if begin:
        begin(*begin_args)


def usable_cores() -> int:
    """Cores that this process may use, or fewer where its container has a quota of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return within_quota(cores)
