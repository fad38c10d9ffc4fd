"""Plans as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from horovod_owt.compression import powersgd_rank
from horovod_owt.perf.machine import Machine

WIDTH = 110
BOUND = {"communication": "comm", "host-to-device": "copy"}  # short, for the table


def table(rows: Sequence[Sequence[str]], *, left: frozenset[int] = frozenset({0})) -> list[str]:
    """The rows in aligned columns; `left` are the left-aligned ones."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """A duration such as 41 s, 7.4 min, 11.1 h, 2.3 d."""
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < most * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} d"


def strategy_name(row: dict[str, Any]) -> str:
    return f"hybrid {row['owt_scheme']}" if row["strategy"] == "hybrid" else "data"


def gradients_name(row: dict[str, Any]) -> str:
    """The kind of gradients, such as ", 16-bit gradients"; empty if uncompressed."""
    if rank := powersgd_rank(row["compression"]):
        return f", gradients of rank {rank}"
    return {16: ", 16-bit gradients", 1: ", gradients in one bit"}.get(row["gradient_bits"], "")


def _bits(row: dict[str, Any]) -> str:
    rank = powersgd_rank(row["compression"])
    return f"rank {rank}" if rank else str(row["gradient_bits"])


def format_plan(document: dict[str, Any], machine: Machine) -> str:
    """The plan as text: the table, the best rows, failures, and the estimates that it rests on."""
    head = ["nodes", "strategy", "K", "bits", "ms", "compute", "exch.", "exposed", "decode"]
    head += ["images/s", "epoch", "run", "eff.", "GB", "bound by"]
    cells = [head]
    for row in document["rows"]:
        numbers = ("step_ms", "compute_ms", "exchange_ms", "exposed_comm_ms", "decode_ms")
        cells.append(
            [
                f"{row['nodes']} x {row['gpus'] // row['nodes']}",
                strategy_name(row),
                str(row["fc_group_size"]),
                _bits(row),
                *(f"{row[name]:.1f}" for name in numbers),
                f"{row['images_per_s']:,.0f}",
                duration(row["epoch_s"]),
                duration(3600 * row["run_h"]),
                f"{row['efficiency']:.2f}",
                f"{row['memory_gb']:.2f}",
                BOUND.get(row["bound_by"], row["bound_by"]) + ("" if row["fits_memory"] else "; memory"),
            ]
        )
    method = document["method"]
    lines = [
        f"{machine.name}: {machine.about}",
        f"{method['net']}, {method['batch_per_rank']} images of {method['image_size']} px per rank, "
        f"{method['precision']}, {method['images']:,} images an epoch, {_length(method)}, "
        f"{method['ranks_per_node']} ranks a node",
        "",
        *table(cells, left=frozenset({1, 14})),
        "",
        *(_best(row) for row in document["best_by_nodes"]),
    ]
    if document.get("goodput"):
        lines += ["", *format_goodput(document["goodput"], method["slow_node"])]
    if guesses := method["estimates"]:
        told = f"estimates of this machine, not measured: {', '.join(guesses)}"
        lines += textwrap.wrap(told, WIDTH)
    return "\n".join(lines)


def _length(method: dict[str, Any]) -> str:
    most = f", at most {method['max_steps']:,} steps" if method["max_steps"] else ""
    return f"{method['epochs']} epochs{most}"


def _best(row: dict[str, Any]) -> str:
    nodes = f"{row['nodes']} node{'s' * (row['nodes'] > 1)}"
    groups = f" in groups of {row['fc_group_size']}" if row["strategy"] == "hybrid" else ""
    return (
        f"best on {nodes}: {strategy_name(row)}{groups}{gradients_name(row)}: "
        f"{row['images_per_s']:,.0f} images/s, an epoch in {duration(row['epoch_s'])}, "
        f"bound by {row['bound_by']}"
    )


def format_goodput(reports: list[dict[str, Any]], slow: float) -> list[str]:
    """The cost of failures as a table, a line for each number of nodes."""
    head = ["nodes", "failure every", "Young", "Daly", "steps", "goodput", "if hourly"]
    head += ["one slow node", "without it"]
    cells = [head]
    for each in reports:
        cells.append(
            [
                str(each["nodes"]),
                duration(each["mtbf_s"]),
                duration(each["young_s"]),
                duration(each["daly_s"]),
                f"{each['checkpoint_every_steps']:,}",
                f"{each['goodput']:.2%}",
                f"{each['goodput_hourly']:.2%}",
                f"{each['slow_node_costs']:.1%}",
                f"{each['without_it_costs']:.1%}",
            ]
        )
    first = reports[0]
    told = (
        "Young, Daly: best time between checkpoints; steps: the same, for checkpoint_every. A checkpoint "
        f"stops training for {duration(first['checkpoint_s'])}, a restart takes "
        f"{duration(first['restart_s'])}. One slow node: what the job loses if one computes "
        f"{slow:g} times as long, and without that node."
    )
    return ["failures", *table(cells, left=frozenset()), *textwrap.wrap(told, WIDTH)]


def format_published(document: dict[str, Any]) -> str:
    """Predictions and published measurements as a table."""
    cells = [["images", "ranks", "measured images/s", "predicted", "difference"]]
    for row in document["rows"]:
        cells.append(
            [
                row["images"],
                str(row["gpus"]),
                f"{row['measured']:,.0f}",
                f"{row['predicted']:,.0f}",
                f"{row['predicted'] / row['measured'] - 1:+.1%}",
            ]
        )
    return "\n".join(
        [f"{document['title']}: {document['net']}, batch {document['batch']} a GPU", "", *table(cells)]
    )
