"""What a user can get wrong, each with its exit code.

1 the run failed; 2 bad usage or config; 3 a check found a problem; 75 stopped at a checkpoint, requeue me.
"""

from __future__ import annotations


class OwtError(Exception):
    """A mistake or mishap that a message can explain: printed as one line, without a traceback."""

    exit_code = 1
    shared = False  # every rank of this host has met it, so that one of them may speak for all
    silent = False  # rank 0 says it, and all leave together

    def __init__(self, saw: str, *, wanted: str = "", fix: str = "") -> None:
        self.saw, self.wanted, self.fix = saw, wanted, fix
        super().__init__(saw, wanted, fix)  # all of them, so that an error survives pickling

    def on_every_rank(self) -> OwtError:
        """The same error, marked as one that each rank raises."""
        self.shared = True
        return self

    def by_rank_0(self, rank: int) -> OwtError:
        """The same error, marked as one that all ranks of the job raise at once, and rank 0 tells."""
        self.silent = rank != 0
        return self

    def __str__(self) -> str:
        parts = [self.saw, self.wanted and f"wanted {self.wanted}", self.fix and f"fix: {self.fix}"]
        return "; ".join(part for part in parts if part)

    def __reduce__(self):
        return _rebuild, (type(self), self.saw, self.wanted, self.fix)


def _rebuild(kind: type[OwtError], saw: str, wanted: str, fix: str) -> OwtError:
    return kind(saw, wanted=wanted, fix=fix)


class RunError(OwtError):
    """The run cannot go on: a bad image under way, a loss that is no number, a disk that is full."""


class ConfigError(OwtError):
    """A recipe, an option or a --set value that makes no sense."""

    exit_code = 2


class DataError(OwtError):
    """A data set that is missing, empty, unreadable or does not fit together."""

    exit_code = 2


class DeviceError(OwtError):
    """Ranks and devices do not match."""

    exit_code = 2


class ProblemFound(OwtError):
    """A check did its work, and what it looked at is not as it should be."""

    exit_code = 3


class Preempted(OwtError):
    """The run stopped at a checkpoint because it was told to; requeue it."""

    exit_code = 75
    shared = True  # ranks agree on it, and rank 0 leaves first, when all is on disk
