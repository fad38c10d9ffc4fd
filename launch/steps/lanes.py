"""The lanes; a lane is a constraints file and a kind of Horovod build."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from steps.compiler import GccRange
from steps.machine import Gpu, driver_fault
from steps.place import LAUNCH
from steps.process import Missing, say


@dataclass(frozen=True)
class Lane:
    name: str
    extras: tuple[str, ...]  # of setup.cfg
    gcc: GccRange
    torch: str
    python_newest: int  # minor version of the last Python that this torch has wheels for
    cuda_major: int | None = None  # None: no GPU operations
    nccl_package: str | None = None  # pip's, the one torch itself loads
    dali: str = "nvidia-dali-cuda130"
    toolkit_package: str = ""  # NVIDIA's, for apt-get
    toolkit_from_pip: bool = False  # whether pip's nvcc package of this CUDA has an nvcc
    capability_from: float = (
        0.0  # the oldest device code in torch's wheel, and with a last one in `capability_to`
    )
    capability_to: float = float("inf")
    driver_from: int = 0  # NVIDIA's oldest driver branch that runs it

    @property
    def constraints(self) -> Path:
        return LAUNCH / "constraints" / f"{self.name}.txt"

    def without_gpus(self) -> "Lane":
        """The same packages, with a Horovod for CPU cores."""
        return replace(self, cuda_major=None, gcc=GccRange(self.gcc.oldest))  # the newest is nvcc's

    def runs_on(self, gpu: Gpu) -> bool:
        return self.capability_from <= gpu.capability <= self.capability_to and gpu.branch >= self.driver_from


LANES = {
    lane.name: lane
    for lane in (
        # torch 2.14 requires C++20: g++ 10
        Lane("cpu", ("dali", "plots", "export", "test", "docs"), GccRange(10), "2.14.1", python_newest=14),
        Lane(
            "cuda",
            ("dali", "plots", "export", "test", "docs"),
            GccRange(10),
            "2.14.1",
            python_newest=14,
            cuda_major=13,
            nccl_package="nvidia-nccl-cu13",
            toolkit_package="cuda-toolkit-13-0",
            toolkit_from_pip=True,
            capability_from=7.5,
            driver_from=580,
        ),
        # torch 2.10 is the last wheel for CUDA 12, whose nvcc supports g++ up to 14
        Lane(
            "cuda12",
            ("dali-cuda12", "plots", "export", "test", "docs"),
            GccRange(9, 14),
            "2.10.0",
            python_newest=14,
            cuda_major=12,
            nccl_package="nvidia-nccl-cu12",
            dali="nvidia-dali-cuda120",
            toolkit_package="cuda-toolkit-12-8",
            capability_from=7.0,
            driver_from=525,
        ),
        # torch 2.0.1 is the last wheel with Kepler's sm_37; CUDA 11's nvcc supports g++ up to 11
        Lane(
            "k80",
            ("dali-k80", "plots", "test", "docs"),
            GccRange(7, 11),
            "2.0.1",
            python_newest=11,
            cuda_major=11,
            nccl_package="nvidia-nccl-cu11",
            dali="nvidia-dali-cuda110",
            toolkit_package="cuda-toolkit-11-8",
            capability_from=3.7,
            capability_to=8.6,
            driver_from=450,
        ),
    )
}


def choose(
    asked: str | None, kept: str | None, gpus: Sequence[Gpu], *, for_other_nodes: bool = False
) -> tuple[Lane, str]:
    """The lane and the reason; an explicit choice holds until another one is made.

    Raises Missing for a lane that this machine's GPUs or driver cannot run, unless it is set up for others.
    """
    if asked is not None or kept is not None:
        lane, why = _chosen(asked, kept, gpus)
    else:
        lane, why = fitting_lane(gpus)
    if lane.cuda_major and not for_other_nodes:
        for gpu in gpus:
            if not lane.runs_on(gpu):
                raise Missing(f"the {lane.name} lane does not run here: {_shortfall(lane, gpu)}")
    return lane, why


def _chosen(asked: str | None, kept: str | None, gpus: Sequence[Gpu]) -> tuple[Lane, str]:
    if asked is not None:
        return LANES[asked], "set by --lane"
    try:
        fitting, why = fitting_lane(gpus)
    except Missing:
        fitting = None
    if fitting is not None and fitting.name != kept:
        name = fitting.name
        say(f"the default for this machine is the {name} lane ({why}): `--lane {name}` selects it")
    return LANES[kept], "chosen by an earlier setup of this virtual environment"


def fitting_lane(gpus: Sequence[Gpu]) -> tuple[Lane, str]:
    """The first lane that all GPUs of the machine and their driver can run; else raises Missing."""
    if not gpus:
        if fault := driver_fault():
            raise Missing(f"{fault}: reboot after a driver update, or use the CPU: `launch/setup --lane cpu`")
        return LANES["cpu"], "nvidia-smi lists no GPU here"
    oldest = min(gpus, key=lambda gpu: gpu.capability)
    seen = f"{len(gpus)} GPU(s), the oldest {oldest}"
    for lane in LANES.values():
        if lane.cuda_major and all(lane.runs_on(gpu) for gpu in gpus):
            return lane, seen
    raise Missing(
        f"{seen}: no lane runs there, wanted driver >= 580 for compute capability >= 7.5, >= 525 for >= 7.0, "
        ">= 450 for 3.7 to 8.6: install a newer NVIDIA driver, or use its CPU: `launch/setup --lane cpu`"
    )


def _shortfall(lane: Lane, gpu: Gpu) -> str:
    """What a GPU lacks for a lane, and the way out."""
    if gpu.branch < lane.driver_from:
        wanted = f">= {lane.driver_from} for CUDA {lane.cuda_major}"
        return f"driver {gpu.driver}, wanted {wanted}: update it, or {_OTHER}"
    to = f" to {lane.capability_to}" if lane.capability_to < float("inf") else " or more"
    return f"{gpu.name} has compute capability {gpu.capability}, wanted {lane.capability_from}{to}: {_OTHER}"


_OTHER = "leave --lane out; for other nodes than this one, set HOROVOD_BUILD_CUDA_CC_LIST to theirs"
