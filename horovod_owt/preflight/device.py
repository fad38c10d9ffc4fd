"""Checks of each rank's device: not shared, usable by this torch, and healthy."""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from horovod_owt.errors import DeviceError
from horovod_owt.parallel.device import NO_START, Device, can_run, check_not_shared, driver_runs
from horovod_owt.parallel.gpus import read_health
from horovod_owt.preflight.findings import Answer, Finding, agreement, differing, grouped, hosts_of, who

PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
# PCI Express Base Specification, "Access Control Services extended capability": its id, the offset of its
# control register, and the bits of the register that redirect peer-to-peer packets through the root complex.
EXTENDED_CAPABILITIES, ACS, ACS_CONTROL = 0x100, 0x000D, 6
REDIRECTS = 0b11100  # request, completion, upstream forwarding


def look(device: Device) -> dict[str, Any]:
    """Describe this rank's device; loads torch if it is a GPU."""
    found = {"name": device.name, "uuid": device.uuid, "words": str(device)}
    if device.gpu is None:
        return found
    import torch

    from horovod_owt.parallel.cuda import cuda_fault

    try:
        state = {"health": asdict(read_health(device.gpu.index))}
    except DeviceError as error:
        state = {"lost": str(error)}
    return {
        **found,
        **state,
        "gpu": asdict(device.gpu),
        "architectures": torch.cuda.get_arch_list(),
        "cuda": torch.version.cuda or "",
        "cuda_fault": cuda_fault(),
        "acs": redirecting_bridges(device.gpu.pci),
    }


def judge(answers: Sequence[Answer]) -> list[Finding]:
    """Every rank has its own device; GPUs are also checked for compatibility and health."""
    gpus = [answer for answer in answers if "gpu" in answer.value]
    findings = [_judge_kinds(answers), _judge_sharing(answers)]
    if gpus:
        started = [answer for answer in gpus if not _does_not_start(answer.value)]
        findings += [_judge_architecture(started)] if started else []
        findings += [_judge_driver(gpus), _judge_start(gpus), _judge_presence(gpus), _judge_acs(gpus)]
        findings += _judge_health([answer for answer in gpus if "health" in answer.value])
    return findings


def _judge_kinds(answers: Sequence[Answer]) -> Finding:
    """All devices are of one kind, because the slowest sets the pace."""
    kinds = grouped(answers, lambda value: value["gpu"]["name"] if "gpu" in value else "CPU cores")
    saw, hosts = differing(kinds)
    fix = "use --constraint with Slurm; check the driver of hosts without a GPU" if len(kinds) > 1 else ""
    return Finding("devices", len(kinds) == 1, saw, "one kind for all ranks", fix, hosts)


def _judge_sharing(answers: Sequence[Answer]) -> Finding:
    try:
        check_not_shared({a.rank: (a.host, a.value["uuid"], a.value["words"]) for a in answers}, os.environ)
    except DeviceError as error:
        ranks = Counter(a.value["uuid"] for a in answers if a.value["uuid"])  # cores have none
        twos = [a for a in answers if ranks[a.value["uuid"]] > 1]
        return Finding("device sharing", False, error.saw, error.wanted, error.fix, hosts_of(twos))
    return Finding("device sharing", True, "no device is shared, or sharing is allowed")


def _judge_fit(
    check: str, gpus: Sequence[Answer], fits: Callable[[dict], bool], words: Callable[[dict], str], fix: str
) -> Finding:
    """Whether each GPU `fits` this torch; `words` describes the first one that does not, else the first."""
    unfit = [answer for answer in gpus if not fits(answer.value)]
    saw = words((unfit or gpus)[0].value) + (f"; {who(unfit)}" if unfit else "")
    return Finding(check, not unfit, saw, "a torch that can use it", fix if unfit else "", hosts_of(unfit))


def _judge_architecture(gpus: Sequence[Answer]) -> Finding:
    """torch contains machine code for some compute capabilities; newer minor versions can run it too."""

    def words(value: dict) -> str:
        major, minor = value["gpu"]["compute_capability"]
        built = " ".join(value["architectures"])
        return f"{value['gpu']['name']} is sm_{major}{minor}; torch is built for {built}"

    return _judge_fit(
        "GPU architecture",
        gpus,
        lambda value: can_run(value["architectures"], tuple(value["gpu"]["compute_capability"])),
        words,
        "launch/setup --lane k80 for a Tesla K80, otherwise an older torch",
    )


def _judge_driver(gpus: Sequence[Answer]) -> Finding:
    """The driver supports torch's major version of CUDA."""
    return _judge_fit(
        "driver",
        gpus,
        lambda value: driver_runs(value["cuda"], value["gpu"]["cuda_driver"]),
        lambda value: (
            f"driver {value['gpu']['driver']} supports CUDA up to {value['gpu']['cuda_driver']}; "
            f"torch has {value['cuda']}"
        ),
        "install a newer driver, or use a lane with an older CUDA: launch/setup --lane",
    )


def _judge_start(gpus: Sequence[Answer]) -> Finding:
    """CUDA starts; it may fail even if the driver is new enough."""
    failed = [answer for answer in gpus if _does_not_start(answer.value)]
    saw = f"does not start: {failed[0].value['cuda_fault']}; {who(failed)}" if failed else "starts"
    fix = NO_START if failed else ""
    return Finding("CUDA", not failed, saw, "a driver that works", fix, hosts_of(failed))


def _does_not_start(value: dict) -> bool:
    """Whether CUDA fails although the driver is new enough; torch then does not list its architectures."""
    built_for = value["cuda"]
    return bool(value["cuda_fault"] and built_for) and driver_runs(built_for, value["gpu"]["cuda_driver"])


def _judge_presence(gpus: Sequence[Answer]) -> Finding:
    lost = [answer for answer in gpus if "lost" in answer.value]
    saw = "; ".join(f"{answer.value['lost']}, {who([answer])}" for answer in lost[:4])
    good = f"{len(gpus)} GPUs respond"
    fix = "check `nvidia-smi` and `dmesg` there; drain the host" if lost else ""
    return Finding("GPU answers", not lost, saw or good, "every GPU reports its state", fix, hosts_of(lost))


def _judge_health(gpus: Sequence[Answer]) -> list[Finding]:
    if not gpus:
        return []

    def unhealthy(check: str, fault: Callable[[dict], str], wanted: str, fix: str) -> Finding:
        found = [(answer, words) for answer in gpus if (words := fault(answer.value["health"]))]
        saw = "; ".join(f"{words} on {answer.host}: {answer.value['words']}" for answer, words in found[:4])
        good = f"none on {len(gpus)} GPUs"
        hosts = hosts_of(answer for answer, _ in found)
        return Finding(check, not found, saw or good, wanted, fix if found else "", hosts)

    def errors(health: dict) -> str:
        count, pending = health["uncorrected_ecc_errors"], health["retired_pages_pending"]
        return " and ".join(
            [
                *([f"{count} uncorrected errors"] if count else []),
                *(["pages pending retirement"] if pending else []),
            ]
        )

    def narrow(health: dict) -> str:
        """Lanes, not the generation, which an idle link lowers by itself."""
        now, most = health["pcie_width"], health["max_pcie_width"]
        return f"{now} of {most} PCIe lanes" if now and most and now < most else ""

    return [
        unhealthy(
            "GPU memory", errors, "no uncorrected ECC errors", "`nvidia-smi -r` or reboot; drain the host"
        ),
        unhealthy(
            "GPU throttling",
            lambda health: ", ".join(health["throttle_reasons"] or ()),
            "full clocks",
            "check cooling and power supply; `nvidia-smi -q -d PERFORMANCE`",
        ),
        unhealthy("PCIe width", narrow, "all lanes", "reseat the card; check the slot"),
        _judge_persistence(gpus),
        *_judge_clocks(gpus),
    ]


def _judge_persistence(gpus: Sequence[Answer]) -> Finding:
    """Never bad: without persistence the driver resets clocks between jobs, and jobs start seconds later."""
    off = [answer for answer in gpus if answer.value["health"]["persistence_mode"] is False]
    saw = f"off on {who(off)}" if off else f"on, or not reported, on {len(gpus)} GPUs"
    return Finding("GPU persistence", True, saw, "", "`nvidia-smi -pm 1`" if off else "")


def _judge_clocks(gpus: Sequence[Answer]) -> list[Finding]:
    """GPUs of one kind have the same clock settings (current clocks depend on the load)."""
    settings = [
        Answer(
            answer.rank,
            answer.host,
            {
                f"{answer.value['gpu']['name']} {name.replace('_', ' ')}": answer.value["health"][name]
                for name in ("max_sm_clock_mhz", "applications_clock_mhz", "auto_boost")
            },
        )
        for answer in gpus
    ]
    if len({answer.value["gpu"]["name"] for answer in gpus}) > 1:  # reported by `devices`
        return []
    return agreement("GPU clocks", settings, fix="`nvidia-smi -rac`, `nvidia-smi --auto-boost-default=1`")


def redirecting_bridges(pci: str, sysfs: Path = Path("/sys")) -> list[str] | None:
    """Bridges above a GPU that redirect peer-to-peer traffic to the root complex; None if not readable.

    Only root can read that part of a bridge's configuration space.
    """
    device = (sysfs / "bus/pci/devices" / pci).resolve()
    found, seen = [], False
    for bridge in device.parents:
        if not PCI_ADDRESS.fullmatch(bridge.name):
            continue
        try:
            config = (bridge / "config").read_bytes()
        except OSError:
            continue
        seen |= len(config) > EXTENDED_CAPABILITIES
        if (acs_control(config) or 0) & REDIRECTS:
            found.append(bridge.name)
    return found if seen else None


def acs_control(config: bytes) -> int | None:
    """The ACS control register in a PCI configuration space; None if there is none or it is truncated."""
    offset = EXTENDED_CAPABILITIES
    for _ in range(96):  # the most that fit; a broken list may be circular
        if offset < EXTENDED_CAPABILITIES or offset + 8 > len(config):
            return None
        (header,) = struct.unpack_from("<I", config, offset)
        if header & 0xFFFF == ACS:
            return struct.unpack_from("<H", config, offset + ACS_CONTROL)[0]
        offset = header >> 20
    return None


def _judge_acs(gpus: Sequence[Answer]) -> Finding:
    """ACS costs peer-to-peer transfers most of their bandwidth; irrelevant on a host with one GPU."""
    counts = Counter(answer.host for answer in gpus)
    several = [answer for answer in gpus if counts[answer.host] > 1]
    on = [answer for answer in several if answer.value["acs"]]
    blind = [answer for answer in several if answer.value["acs"] is None]
    saw = f"on at {' '.join(on[0].value['acs'])}; {who(on)}" if on else "off, or one GPU per host"
    if blind and not on:
        saw = f"not readable without root on {', '.join(hosts_of(blind)[:4])}"
    fix = "`setpci -s BRIDGE ECAP_ACS+6.w=0000` as root, or disable it in the firmware"
    return Finding("PCIe ACS", not on, saw, "off between GPUs", fix if on else "", hosts_of(on))
