"""The three lanes; a lane is a constraints file and a kind of Horovod build."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steps.compiler import GccRange
from steps.machine import Gpu
from steps.place import LAUNCH
from steps.process import say


@dataclass(frozen=True)
class Lane:
    name: str
    extras: tuple[str, ...]  # of setup.cfg
    gcc: GccRange
    torch: str
    python_newest: int  # minor version of the last Python that this torch has wheels for
    cuda_major: int | None = None  # None: no GPU operations
    nccl_package: str | None = None  # pip's, the one torch itself loads

    @property
    def constraints(self) -> Path:
        return LAUNCH / "constraints" / f"{self.name}.txt"


LANES = {
    lane.name: lane
    for lane in (
        # torch 2.14 requires C++20: g++ 10
        Lane("cpu", ("dali", "test", "docs"), GccRange(10), "2.14.1", python_newest=14),
        Lane(
            "cuda",
            ("dali", "test", "docs"),
            GccRange(10),
            "2.14.1",
            python_newest=14,
            cuda_major=13,
            nccl_package="nvidia-nccl-cu13",
        ),
        # torch 2.0.1 is the last wheel with Kepler's sm_37; CUDA 11's nvcc supports g++ up to 11
        Lane(
            "k80",
            ("dali-k80", "test", "docs"),
            GccRange(7, 11),
            "2.0.1",
            python_newest=11,
            cuda_major=11,
            nccl_package="nvidia-nccl-cu11",
        ),
    )
}
CUDA_LANE_FROM = 7.5  # the oldest device code in torch 2.14's wheel: Turing


def choose(asked: str | None, kept: str | None, gpus: Sequence[Gpu]) -> tuple[Lane, str]:
    """The lane and the reason; an explicit choice holds until another one is made."""
    fitting, why = fitting_lane(gpus)
    if asked is not None:
        return LANES[asked], "set by --lane"
    if kept is None or kept == fitting:
        return LANES[fitting], why
    say(f"the default for this machine is the {fitting} lane ({why}): `--lane {fitting}` selects it")
    return LANES[kept], "chosen by an earlier set-up of this virtual environment"


def fitting_lane(gpus: Sequence[Gpu]) -> tuple[str, str]:
    """The lane that the oldest GPU of the machine can run."""
    if not gpus:
        return "cpu", "nvidia-smi lists no GPU here"
    oldest = min(gpus, key=lambda gpu: gpu.compute_capability or 0.0)
    if oldest.compute_capability is None:  # the query came with driver 510; Kepler's last driver is 470
        return "k80", f"driver {oldest.driver} of {oldest.name} is too old for CUDA 13"
    seen = f"{len(gpus)} GPU(s), the oldest {oldest.name} with compute capability {oldest.compute_capability}"
    return ("cuda" if oldest.compute_capability >= CUDA_LANE_FROM else "k80"), seen
