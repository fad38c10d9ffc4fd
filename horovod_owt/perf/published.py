"""Compare predictions with figures that others published for a machine."""

from __future__ import annotations

from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.perf.calibrate import Measured, fit_steps
from horovod_owt.perf.layers import NETS
from horovod_owt.perf.machine import Machine
from horovod_owt.perf.parts import Job
from horovod_owt.perf.plan import predict_row


def compare_published(machine: Machine) -> dict[str, Any]:
    """Measured and predicted images/s, fitted to one device; ConfigError if nothing was published."""
    if not machine.published:
        raise ConfigError(f"{machine.name} has no published figures", wanted="a machine that has some")
    (published,) = machine.published
    net, batch, rows = NETS[published["net"]], published["batch"], []
    cfg = TrainConfig(batch=batch, classes=net.classes)
    for images in ("synthetic", "real"):
        measured = published[images]
        alone = fit_steps(
            machine.with_figures("published", overlap=published["overlap"]),
            [Measured(cfg, batch / measured[1])],
            net,
            source=published["title"],
        )
        for ranks, images_per_s in measured.items():
            job = Job(cfg, net, 1, ranks, decodes=images == "real")
            row = predict_row(alone, job)
            rows.append(
                {
                    "images": images,
                    "gpus": ranks,
                    "measured": images_per_s,
                    "predicted": row.images_per_s,
                    "bound_by": row.bound_by,
                }
            )
    return {"title": published["title"], "net": net.name, "batch": batch, "rows": rows}
