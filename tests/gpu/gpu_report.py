"""What a GPU machine has shown, as JSON and Markdown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALWAYS_MISSING = [
    "several hosts, InfiniBand, GPUDirect RDMA",
    "the real ImageNet, and a run to its published error",
    "a Tesla K80",
]
ONE_GPU_MISSING = [
    "NCCL between GPUs (NVLink, PCI Express): with one GPU, ranks share it, over sockets",
    "scaling: ranks that share a GPU are not faster together",
]


@dataclass
class GpuReport:
    """Results of tests, and measurements by title: rows of equal keys."""

    machine: dict[str, Any] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)  # test -> passed, failed, skipped: why
    seconds: dict[str, float] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add_row(self, table: str, **values: Any) -> None:
        self.tables.setdefault(table, []).append(values)

    def not_shown(self) -> list[str]:
        """What this machine, or this run, cannot tell."""
        one = ONE_GPU_MISSING if self.machine.get("gpus", 0) < 2 else []
        skipped = [
            f"{test}: {result}" for test, result in self.results.items() if result.startswith("skipped")
        ]
        mig = [] if self.machine.get("mig") else ["MIG instances"]
        return [*one, *mig, *ALWAYS_MISSING, *skipped]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {**vars(self), "not_shown": self.not_shown()}
        (folder / "gpu-report.json").write_text(json.dumps(content, indent=2) + "\n")
        (folder / "gpu-report.md").write_text(self.markdown())

    def markdown(self) -> str:
        count = {
            kind: sum(r.startswith(kind) for r in self.results.values()) for kind in ("passed", "failed")
        }
        lines = [
            "# GPU report",
            "",
            *_rows([self.machine]),
            "",
            f"{count['passed']} passed, {count['failed']} failed",
        ]
        lines += ["", "| test | result | s |", "|---|---|---|"]
        lines += [
            f"| {test} | {result} | {self.seconds.get(test, 0):.1f} |"
            for test, result in self.results.items()
        ]
        for title, rows in self.tables.items():
            lines += ["", f"## {title}", "", *_rows(rows)]
        lines += ["", "## Not shown", "", *(f"- {line}" for line in self.not_shown()), ""]
        return "\n".join(lines)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*map(str, keys)], ["---"] * len(keys), *cells)]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
