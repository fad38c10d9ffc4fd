"""Run folders as training writes them, with made-up figures, for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from horovod_owt.config import TrainConfig
from horovod_owt.perf.traffic import bytes_sent_per_step
from horovod_owt.runs.records import utc

BEGAN = 1_795_000_000.0  # seconds since 1970
EPOCH_STEPS = 50


class WrittenRun:
    """Writes a run folder record by record; `clock` is the time of the next one."""

    def __init__(self, folder: Path, *, seed: int = 0, stamped: bool = True, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.clock, self.step, self.attempt = folder, BEGAN, 0, 0
        self.config = TrainConfig(**{"classes": 10, "batch": 32, "epochs": 6, "fc_group_size": 1} | settings)
        self.random, self.stamped = random.Random(seed), stamped
        self.file = (folder / "metrics.jsonl").open("a")
        (folder / "config.json").write_text(json.dumps(self.config.to_dict()))

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        stamp = {"time": utc(self.clock), "attempt": self.attempt, "job_id": None} if self.stamped else {}
        record = {"kind": kind, **stamp, **values}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        return record

    def start(self, hosts: list[str], *, first_step: int = 0, attempt: bool = True, **values: Any) -> None:
        self.attempt += attempt
        self.hosts, self.step = hosts, first_step
        started = {"started": utc(self.clock)} if self.stamped else {}
        self.clock += 12
        sent = bytes_sent_per_step(self.config, len(hosts))
        self.write(
            "run",
            **started,
            config=self.config.to_dict(),
            versions={
                "horovod_owt": "0.1.0",
                "python": "3.11.7",
                "torch": "2.14.1",
                "horovod": "0.28.1+owt.1",
            },
            hosts=hosts,
            data="/data/imagenet",
            world_size=len(hosts),
            global_batch=self.config.global_batch(len(hosts)),
            first_step=first_step,
            bytes_sent_per_step_expected=sent,
            train_images=EPOCH_STEPS * self.config.global_batch(2),
            val_images=500,
            **values,
        )

    def steps(self, count: int, *, step_ms: float = 900.0, **values: Any) -> None:
        """As many steps, each with a validation and a checkpoint at the end of an epoch."""
        for _ in range(count):
            self.step += 1
            took_ms = step_ms * self.random.lognormvariate(0, 0.08)
            self.clock += 1e-3 * took_ms
            epoch = self.step / EPOCH_STEPS
            self.write(
                "step",
                step=self.step,
                epoch=epoch,
                loss=2.3 * math.exp(-epoch / 2.5) * self.random.lognormvariate(0, 0.12) + 0.05,
                lr=0.01 * min(1.0, epoch / 0.5) * (1 + math.cos(math.pi * min(1.0, epoch / 6))) / 2,
                images_per_s=1e3 * self.config.global_batch(len(self.hosts)) / took_ms,
                step_ms=took_ms,
                data_wait_ms=0.04 * took_ms,
                exposed_comm_ms=0.15 * took_ms,
                bytes_sent=bytes_sent_per_step(self.config, len(self.hosts)),
                bad_images=0,
                **values,
            )
            if self.step % EPOCH_STEPS == 0:
                self.validate()

    def validate(self) -> None:
        epoch = self.step / EPOCH_STEPS
        top1, top5 = (round(500 * (1 - math.exp(-epoch / scale))) for scale in (2.2, 0.5))
        self.clock += 6
        self.write(
            "validation",
            epoch=epoch,
            step=self.step,
            images=500,
            correct_top1=top1,
            correct_top5=top5,
            top1=top1 / 5,
            top5=top5 / 5,
            loss=1.9 * math.exp(-epoch / 3),
            bad_images=0,
        )
        self.write("checkpoint", step=self.step, stall_ms=120.0, write_s=2.5)

    def outcome(self, exit_code: int = 0, reason: str = "done", **values: Any) -> None:
        outcome = {"exit_code": exit_code, "reason": reason, "step": self.step, **values}
        record = self.write("outcome", **outcome)
        record.pop("kind")
        (self.folder / "outcome.json").write_text(json.dumps(record))


def eventful_run(folder: Path, **settings: Any) -> WrittenRun:
    """A run that was killed, resumed before where it was, regrouped twice, met bad images, and is done."""
    run = WrittenRun(folder, **settings)
    run.start(["node1"] * 2 + ["node2"] * 2)
    run.steps(70, step_ms=950)
    run.write("fault", fault="stalled: rank 3 on node2 has been silent for 62 s", step=run.step)
    run.clock += 90
    run.start(["node1"] * 2 + ["node2"] * 2, first_step=50)
    run.steps(60)
    run.write("fault", path="/data/imagenet/train/n01440764/broken.JPEG", fault="truncated", rank=1, step=111)
    run.write("fault", path="/data/imagenet/train/n01443537/empty.JPEG", fault="empty file", rank=2, step=111)
    slow = {"rank": 3, "host": "node2", "what": "compute", "own_ms": 911.5, "others_ms": 730.25}
    run.write("straggler", step=111, **slow, recovered=False)
    run.steps(20)
    run.clock += 20
    run.write("fault", fault="ranks regroup: rank 2 on node2 died", step=130, world_size=4)
    run.start(["node1"] * 2, first_step=130, attempt=False)
    run.steps(60, step_ms=700)
    run.write("fault", fault="ranks regroup: hosts joined or left", step=190, world_size=2)
    run.start(["node1"] * 2 + ["node3"] * 2, first_step=190, attempt=False)
    run.steps(110)
    run.outcome(bad_images=2)
    return run
