"""Machines as YAML files: a value for each figure, its source, and whether it is an estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from horovod_owt.errors import ConfigError
from horovod_owt.files import read_user_text
from horovod_owt.perf.layers import NETS
from horovod_owt.perf.links import Links
from horovod_owt.recipe import parse_yaml
from horovod_owt.text import nearest

# Every figure of a machine, with its unit and meaning, and the smallest sensible value.
FIGURES = {
    "ranks_per_node": ("devices of a node, one rank each", 1),
    "peak_gflops": ("GFLOP/s of one device by its specification, fp32", 1e-3),
    "conv_gflops": ("GFLOP/s that the convolutions reach on one device, fp32, counted as direct ones", 1e-3),
    "fc_gflops": ("GFLOP/s that large FC layers reach on one device, fp32", 1e-3),
    "speedup_16": ("how many times as fast both are with 16-bit floats", 1e-3),
    "fixed_ms": ("of a step whatever the batch", 0),
    "memory_gb": ("of a device", 1e-3),
    "memory_gb_s": ("memory bandwidth that a device reaches when it reads and writes weights", 1e-3),
    "decode_images_s": ("JPEGs that one node decodes and augments in a second", 1e-3),
    "host_to_device_gb_s": ("copies of images to one device; 0: none are needed", 0),
    "link_gb_s": ("of a collective between the ranks of a node, per rank and direction", 1e-3),
    "link_us": ("latency of a message between them", 0),
    "net_gb_s": ("of a collective between nodes, per node and direction", 1e-6),
    "net_us": ("latency of a message between nodes", 0),
    "core_gb_s": ("of a collective on a CPU rank's own cores; 0: on a GPU, they are not needed", 0),
    "overlap": ("share of the communication behind the backward pass that really overlaps", 0),
    "jitter": ("standard deviation of one rank's step time, as a share of it", 0),
    "mtbf_days": ("mean time between failures of one node", 1e-6),
    "restart_s": ("from a failure to the first new step", 0),
    "checkpoint_stall_s": ("for which training waits at a checkpoint", 1e-9),
}
MAX_FIGURE = 1e9  # far above any machine, and low enough to calculate with
KEYS = ("about", "device", "shares_cores", "figures", "published", "report")
PUBLISHED = (
    "one of title, net, batch, overlap, and images/s by number of devices, from 1 on: synthetic and real"
)
REPORT = ("s_per_epoch", "epochs", "minutes", "error")


@dataclass(frozen=True)
class Figure:
    """A number, its source, and whether it is an estimate."""

    value: float
    source: str
    estimate: bool = False


@dataclass(frozen=True)
class Machine:
    """A kind of node, with the figures of its devices and links."""

    name: str
    about: str
    device: str
    shares_cores: bool  # CPU ranks decode, compute and send on the same cores
    figures: dict[str, Figure]
    published: tuple[dict[str, Any], ...] = ()  # measured elsewhere, to compare with predictions
    report: dict[str, Any] = dataclasses.field(default_factory=dict)  # figures of a report on this machine

    def __getitem__(self, key: str) -> float:
        return self.figures[key].value

    @property
    def ranks_per_node(self) -> int:
        return int(self["ranks_per_node"])

    def speedup(self, precision: str) -> float:
        """Speedup of arithmetic in this precision over fp32, for which rates are given."""
        return self["speedup_16"] if precision in ("bf16", "fp16") else 1.0

    def links(self, ranks: int | None = None) -> Links:
        """The links of a job with this many ranks per node; by default, one per device."""
        names = ("link_gb_s", "link_us", "net_gb_s", "net_us", "core_gb_s")
        return Links(ranks or self.ranks_per_node, *(self[name] for name in names))

    def with_figures(self, source: str, *, estimate: bool = False, **values: float) -> Machine:
        """The same machine with other values."""
        new = {key: Figure(value, source, estimate) for key, value in values.items()}
        return dataclasses.replace(self, figures=self.figures | new)

    def to_yaml(self) -> str:
        """A machine file."""
        figures = {}
        for key, figure in self.figures.items():
            figures[key] = {"value": figure.value, "source": figure.source}
            if figure.estimate:
                figures[key]["estimate"] = True
        head = {"about": self.about, "device": self.device, "shares_cores": self.shares_cores}
        return yaml.safe_dump({**head, "figures": figures}, sort_keys=False, width=110, allow_unicode=True)


def machine_names() -> list[str]:
    return sorted(
        Path(item.name).stem
        for item in resources.files("horovod_owt.perf.machines").iterdir()
        if item.name.endswith(".yaml")
    )


def load_machine(name_or_file: str, *, option: str = "--machine") -> Machine:
    """A machine of the package or a YAML file; raises ConfigError, whose fix names the user's option."""
    if name_or_file in machine_names():
        text = (resources.files("horovod_owt.perf.machines") / f"{name_or_file}.yaml").read_text(
            encoding="utf-8"
        )
    elif Path(name_or_file).is_file():
        text = read_user_text(Path(name_or_file), wanted="a machine file")
    else:
        raise ConfigError(
            f"machine {name_or_file!r} is neither a known machine nor a file",
            wanted=f"one of {', '.join(machine_names())} or a path",
            fix=f"{option} {nearest(name_or_file, machine_names()) or machine_names()[0]}",
        )
    document = parse_yaml(text, f"machine file {name_or_file}")
    return _machine(Path(name_or_file).stem, document, where=name_or_file)


def _machine(name: str, document: Any, *, where: str) -> Machine:
    document = _mapping(document, where)
    _refuse_unknown(document, KEYS, where)
    figures = _mapping(document.get("figures"), f"{where}: figures")
    _refuse_unknown(figures, FIGURES, where)
    if missing := [key for key in FIGURES if key not in figures]:
        raise ConfigError(
            f"{where} lacks {', '.join(missing)}",
            wanted="every figure of a machine",
            fix=f"add figures.{missing[0]}: {FIGURES[missing[0]][0]}",
        )
    return Machine(
        name,
        about=str(document.get("about", name)),
        device=str(document.get("device", "device")),
        shares_cores=document.get("shares_cores") is True,
        figures={key: _figure(key, figures[key], where) for key in FIGURES},
        published=_published(document.get("published"), where),
        report=_report(document.get("report"), where),
    )


def _published(entries: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not entries:
        return ()
    try:
        (entry,) = entries
        rates = [entry["synthetic"], entry["real"]]
        numbers = [entry["batch"], *(number for each in rates for pair in each.items() for number in pair)]
        valid = entry["net"] in NETS and "title" in entry and 0 <= entry["overlap"] <= 1
        valid = (
            valid and min(numbers) > 0 and all(1 in each and set(map(type, each)) == {int} for each in rates)
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        valid = False
    if not valid:
        raise ConfigError(f"{where}: published", wanted=PUBLISHED, fix="leave it out")
    return (entry,)


def _report(report: Any, where: str) -> dict[str, Any]:
    if report and not (isinstance(report, dict) and all(_is_positive(report.get(key)) for key in REPORT)):
        raise ConfigError(
            f"{where}: report", wanted=f"numbers above 0: {', '.join(REPORT)}", fix="leave it out"
        )
    return report or {}


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _figure(key: str, entry: Any, where: str) -> Figure:
    entry = entry if isinstance(entry, dict) else {"value": entry}
    _refuse_unknown(entry, ("value", "source", "estimate"), f"{where}: {key}")
    return Figure(
        checked(key, entry.get("value"), where),
        str(entry.get("source", "no source given")),
        entry.get("estimate") is True,
    )


def checked(key: str, value: Any, where: str) -> float:
    """`value` as a number in the range of the figure `key`; raises ConfigError."""
    _refuse_unknown({key: value}, FIGURES, where)
    meaning, least = FIGURES[key]
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    most = 1.0 if key == "overlap" else MAX_FIGURE
    if not least <= number <= most or (key == "ranks_per_node" and number % 1):
        raise ConfigError(f"{where}: {key}={value}", wanted=f"{least:g} to {most:g}: {meaning}")
    return number


def replace_figures(machine: Machine, settings: Iterable[str]) -> Machine:
    """The machine with `key=value` settings; raises ConfigError."""
    for setting in settings:
        key, _, value = setting.partition("=")
        _refuse_unknown({key: value}, FIGURES, f"--figure {setting}")
        machine = machine.with_figures("--figure", **{key: checked(key, value, "--figure")})
    return machine


def _mapping(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} contains a {type(value).__name__}", wanted="key: value lines")
    return value


def _refuse_unknown(found: dict, known, where: str) -> None:
    for key in found:
        if key not in known:
            near = nearest(str(key), known)
            fix = f"use {near}" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}", wanted="a key of a machine file", fix=fix)


def load_network(name: str) -> dict[str, float]:
    """net_gb_s and net_us of a kind of network; raises ConfigError."""
    text = (resources.files("horovod_owt.perf.machines") / "networks.yml").read_text(encoding="utf-8")
    networks = yaml.safe_load(text)
    if name not in networks:
        raise ConfigError(
            f"network {name!r}",
            wanted=f"one of {', '.join(networks)}",
            fix=f"--network {nearest(name, networks) or next(iter(networks))}",
        )
    return {key: networks[name][key] for key in ("net_gb_s", "net_us")}
