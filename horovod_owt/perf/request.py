"""A request of `owt plan`, and its answer as one document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.perf.goodput import goodput_report
from horovod_owt.perf.layers import Net
from horovod_owt.perf.machine import Machine
from horovod_owt.perf.parts import Job
from horovod_owt.perf.plan import Row, fastest, group_sizes, plan

MAX_NODES = 100_000


@dataclass(frozen=True)
class PlanRequest:
    """A configuration, and the numbers of nodes of a machine to plan it for."""

    machine: Machine
    cfg: TrainConfig
    net: Net
    nodes: list[int]
    ranks_per_node: int
    images: int
    decodes: bool = True
    two_level: bool = False
    inexact: bool = False  # include lossy compression
    slow: float = 1.25


def parse_nodes(text: str) -> list[int]:
    """Numbers of nodes such as 1,2,4; raises ConfigError."""
    try:
        nodes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        nodes = []
    if not nodes or not 1 <= nodes[0] <= nodes[-1] <= MAX_NODES:
        raise ConfigError(f"--nodes {text}", wanted=f"numbers from 1 to {MAX_NODES:,}", fix="--nodes 1,2,4")
    return nodes


def answer(request: PlanRequest) -> dict[str, Any]:
    """The document: rows for each number of nodes, the best rows, failures, and the method."""
    machine, cfg = request.machine, request.cfg
    rows: list[Row] = []
    best: list[Row] = []
    for nodes in request.nodes:
        job = Job(
            cfg,
            request.net,
            nodes,
            request.ranks_per_node,
            decodes=request.decodes,
            two_level=request.two_level,
        )
        _refuse_groups(cfg, job.ranks)
        found = plan(machine, job, inexact=request.inexact)
        rows += found
        best.append(fastest(found, machine))
    documents = [_document(row, request) for row in rows]
    goodput = [
        goodput_report(machine, row.job.nodes, step_s=row.step_s, slow_step_s=_slow_step_s(row, request))
        for row in best
    ]
    return {
        "machine": machine.name,
        "rows": documents,
        "best": _document(best[-1], request),
        "best_by_nodes": [_document(row, request) for row in best],
        "goodput": goodput,
        "method": {
            "net": request.net.name,
            "image_size": request.net.image_size,
            "batch_per_rank": cfg.rank_batch(),
            "precision": cfg.precision,
            "epochs": cfg.epochs,
            "max_steps": cfg.max_steps,
            "images": request.images,
            "ranks_per_node": request.ranks_per_node,
            "decodes": request.decodes,
            "two_level": request.two_level,
            "slow_node": request.slow,
            "estimates": [key for key, figure in machine.figures.items() if figure.estimate],
            "figures": {key: dataclasses.asdict(figure) for key, figure in machine.figures.items()},
        },
    }


def _slow_step_s(row: Row, request: PlanRequest) -> float:
    """Step time with a slow node, for which all ranks wait unless they wait longer for decoders or copies."""
    work_s = row.step_s if request.machine.shares_cores else row.time.total_s
    return max(row.step_s, work_s + (request.slow - 1) * row.time.compute_s)


def _document(row: Row, request: PlanRequest) -> dict[str, Any]:
    return row.to_dict(request.images) | {"fits_memory": row.memory_gb <= request.machine["memory_gb"]}


def _refuse_groups(cfg: TrainConfig, ranks: int) -> None:
    """Raise ConfigError if hybrid is requested with a group size that does not divide the ranks."""
    if cfg.parallel == "hybrid" and ranks > 1 and not group_sizes(cfg, ranks):
        raise ConfigError(
            f"fc_group_size={cfg.fc_group_size} on {ranks} ranks", wanted="a number above 1 that divides them"
        )
