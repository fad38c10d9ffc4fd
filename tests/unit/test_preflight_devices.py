"""What preflight makes of what ranks say of their devices: GPUs, drivers, sharing, and bridges above them."""

import struct

import pytest
from answers import on_hosts

from horovod_owt.parallel.gpus import Gpu, GpuHealth
from horovod_owt.preflight import device
from horovod_owt.preflight.findings import Answer

GPU = Gpu(0, "GPU-1", "Tesla K80", "0000:05:00.0", (3, 7), 12 << 30, "470.256.02", "11.4")
HEALTH = GpuHealth(0, False, (), True, 562, 875, 562, True, 40, 3, 3, 16, 16)


def gpu_facts(uuid="GPU-1", health=(), **gpu):
    return {
        "name": "cuda:0",
        "uuid": uuid,
        "words": f"Tesla K80 {uuid}",
        "gpu": {**GPU.__dict__, **gpu},
        "health": {**HEALTH.__dict__, **dict(health)},
        "architectures": ["sm_37", "sm_50"],
        "cuda": "11.7",
        "cuda_fault": "",
        "acs": [],
    }


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({}, {}),
        ({"uuid": "GPU-0"}, {"device sharing"}),
        ({"cuda_driver": "10.2"}, {"driver"}),
        ({"cuda_driver": "11.0"}, set()),  # minor versions of CUDA fit
        ({"compute_capability": (9, 0)}, {"GPU architecture"}),
        ({"name": "Tesla V100"}, {"devices"}),
        ({"health": {"uncorrected_ecc_errors": 2}}, {"GPU memory"}),
        ({"health": {"retired_pages_pending": True}}, {"GPU memory"}),
        ({"health": {"throttle_reasons": ("power cap",)}}, {"GPU throttling"}),
        ({"health": {"pcie_width": 8}}, {"PCIe width"}),
        ({"health": {"persistence_mode": False}}, set()),
        ({"health": {"auto_boost": False}}, {"GPU clocks: Tesla K80 auto boost"}),
    ],
)
def test_each_trouble_of_a_gpu_is_found_and_nothing_else(change, bad):
    answers = on_hosts(gpu_facts("GPU-0"), gpu_facts(**{"uuid": "GPU-1", **change}), ranks_each=2)
    assert {finding.check for finding in device.judge(answers) if not finding.ok} == set(bad)


def test_a_cuda_that_does_not_start_is_not_called_a_wrong_torch():
    """Without it torch does not tell what GPUs it is built for."""
    mute = gpu_facts("GPU-1") | {"architectures": [], "cuda_fault": "Error 802: system not yet initialized"}
    (bad,) = [f for f in device.judge(on_hosts(gpu_facts("GPU-0"), mute)) if not f.ok]
    assert (bad.check, bad.hosts) == ("CUDA", ("h1",)) and "Error 802" in bad.saw
    (bad,) = [f for f in device.judge(on_hosts(mute)) if not f.ok]
    assert bad.check == "CUDA" and "fabricmanager" in bad.fix
    old = mute | {"gpu": mute["gpu"] | {"cuda_driver": "10.2"}}
    assert "driver" in {f.check for f in device.judge(on_hosts(old)) if not f.ok}


def test_a_gpu_that_its_driver_has_lost_is_reported_with_the_others_state():
    lost = {name: value for name, value in gpu_facts("GPU-1").items() if name != "health"} | {
        "lost": "fell off"
    }
    findings = device.judge(on_hosts(gpu_facts("GPU-0"), lost, gpu_facts("GPU-2", {"pcie_width": 4})))
    assert {f.check: f.hosts for f in findings if not f.ok} == {"GPU answers": ("h1",), "PCIe width": ("h2",)}


def test_ranks_that_share_a_gpu_are_found_among_those_on_cores_and_across_containers():
    cores = {"name": "cpu", "uuid": "", "words": "cpu"}
    answers = on_hosts(gpu_facts("GPU-0"), gpu_facts("GPU-0"), cores) + [Answer(3, "h2", cores)]
    (shared,) = [f for f in device.judge(answers) if f.check == "device sharing"]
    assert (shared.ok, shared.hosts) == (False, ("h0", "h1"))


def test_a_host_without_a_gpu_among_others_is_named():
    answers = on_hosts(gpu_facts("GPU-0"), gpu_facts("GPU-1"), {"name": "cpu", "uuid": "", "words": "cpu"})
    (bad,) = [finding for finding in device.judge(answers) if not finding.ok]
    assert (bad.check, bad.hosts) == ("devices", ("h2",))


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        ("sm_75 sm_80 sm_90", (3, 7), False),
        ("sm_35 sm_50", (3, 7), True),  # newer of the same major
        ("sm_80", (7, 5), False),
        ("sm_80 sm_90", (12, 0), False),
        ("sm_80 compute_90", (12, 0), True),  # the driver compiles it
        ("sm_90a sm_120", (12, 0), True),
    ],
)
def test_code_runs_on_its_major_and_newer_minors(built_for, capability, runs):
    assert device.can_run(built_for.split(), capability) == runs


def config_space(control: int | None, size=4096) -> bytes:
    """An Advanced Error Reporting capability, and behind it an ACS one."""
    space = bytearray(size)
    struct.pack_into("<I", space, 0x100, 0x0001 | 1 << 16 | (0x148 if control is not None else 0) << 20)
    if control is not None:
        struct.pack_into("<IHH", space, 0x148, 0x000D | 1 << 16, 0x7F, control)
    return bytes(space)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (config_space(0b11101), ["0000:00:02.0"]),
        (config_space(0b00001), []),  # source validation alone redirects nothing
        (config_space(None), []),
        (config_space(0b11101)[:64], None),  # what users other than root get to read
    ],
)
def test_a_bridge_that_redirects_is_found_above_the_gpu(tmp_path, config, found):
    bridge = tmp_path / "devices/pci0000:00/0000:00:02.0"
    gpu = bridge / "0000:05:00.0"
    gpu.mkdir(parents=True)
    (gpu / "config").write_bytes(config_space(0b11101))  # its own does not count
    (bridge / "config").write_bytes(config)
    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    (tmp_path / "bus/pci/devices/0000:05:00.0").symlink_to(gpu)
    assert device.redirecting_bridges("0000:05:00.0", tmp_path) == found


def test_a_ring_of_capabilities_ends():
    space = bytearray(4096)
    struct.pack_into("<I", space, 0x100, 0x0001 | 1 << 16 | 0x100 << 20)
    assert device.acs_control(bytes(space)) is None
