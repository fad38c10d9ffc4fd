"""Random faults for a long time, then an audit: nothing lost, nothing twice, nothing damaged, nobody left.

usage: python tests/soak.py [--minutes 30] [--seed N] [--folder DIR]         (`make soak`)

Two runs of a narrow AlexNet-OWT go on from job to job. To each job chance does something at a random step:
KILL, STOP or a signal that asks to stop, to a random rank; a flipped byte in the newest checkpoint; or
nothing. Run `same` is trained by 2 ranks throughout, in fp32: its losses must equal those of a run that
nothing ever happened to, to the last digit. Run `mixed` is trained by 2 to 4 ranks, data-parallel or hybrid
as it comes, in fp64, where additions in another order leave 1e-6.

Prints one JSON document; exit code 1 when the audit fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

PARALLEL = Path(__file__).parent / "parallel"
GLOBAL_BATCH, IMAGES = 12, 96
SHAPES = {
    "same": [(2, "data")],
    "mixed": [(2, "data"), (3, "data"), (4, "data"), (2, "hybrid"), (4, "hybrid")],
}
PRECISION = {"same": "fp32", "mixed": "fp64"}
TOLERANCE = {"same": 0.0, "mixed": 1e-6}  # of losses, relative
FAULTS = ("KILL", "STOP", "TERM", "USR1", "USR2", "INT", "flipped byte", "nothing")
CONFIG = dict(
    lr_batch=GLOBAL_BATCH, epochs=10**6, dropout=0.5, checkpoint_every=5, fc_group_size=2, stall_limit_s=8,
    pipeline="torchvision", decode_threads=1,
    label_smoothing=0.1,  # or the loss comes to 0, where no difference shows
)  # fmt: skip
JOB_LIMIT_S = 240


class Run:
    """A run folder, the jobs that went on with it, and which of them did which step last."""

    def __init__(self, name: str, folder: Path, data: Path) -> None:
        self.name, self.data, self.folder = name, data, folder / name
        self.notes, self.log = folder / f"{name}-notes", folder / f"{name}.log"
        self.jobs, self.losses, self.job_of_step = 0, {}, {}
        self._lines_read = 0

    def launch(self, ranks: int, parallel: str, until: int) -> subprocess.Popen:
        self.jobs += 1
        values = CONFIG | dict(batch=GLOBAL_BATCH // ranks, max_steps=until, parallel=parallel)
        values |= dict(precision=PRECISION[self.name.removesuffix("-reference")])
        words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        program = [sys.executable, str(PARALLEL / "programs" / "noting.py"), "train", str(self.data)]
        where = ["--run-dir", str(self.folder), "--recipe", str(PARALLEL / "small.yaml")]
        env = os.environ | {"OMP_NUM_THREADS": "1", "OWT_NOTES": f"{self.notes}-job{self.jobs}"}
        with open(self.log, "ab") as log:
            argv = ["horovodrun", "--gloo", "-np", str(ranks), *program, *where, *words]
            return subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)

    def new_steps(self) -> int:
        """Take in what metrics.jsonl says since the last time; how many steps that is."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        steps = [json.loads(line) for line in lines[self._lines_read :] if '"kind": "step"' in line]
        for step in steps:
            self.losses[step["step"]], self.job_of_step[step["step"]] = step["loss"], self.jobs
        self._lines_read = len(lines)
        return len(steps)

    def outcome(self) -> dict:
        return json.loads((self.folder / "outcome.json").read_text())

    def samples(self, step: int) -> list[int]:
        """The images that step was made of, by the notes of the job that did it last."""
        found = []
        for path in sorted(self.notes.parent.glob(f"{self.notes.name}-job{self.job_of_step[step]}-rank*")):
            for line in path.read_text().splitlines():
                consumed, indices = json.loads(line)
                if consumed == (step - 1) * GLOBAL_BATCH:
                    found += indices
        return found


def do_job(run: Run, chance: random.Random, fault: str, failures: list[str]) -> tuple[float | None, float]:
    """One job and what happens to it; when it was struck, if it was, and when its first step was done."""
    ranks, parallel = chance.choice(SHAPES[run.name])
    strike_after, done, struck, first_step = chance.randint(1, 12), 0, None, 0.0
    until = max(run.losses, default=0) + 20
    what = f"{run.name} job {run.jobs + 1}: {fault}, {ranks} ranks {parallel}"
    process = run.launch(ranks, parallel, until)
    deadline = time.monotonic() + JOB_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        done += run.new_steps()
        first_step = first_step or (time.monotonic() if done else 0.0)
        if struck is None and fault != "nothing" and done >= strike_after:
            struck = time.monotonic()
            strike(run, process.pid, fault, chance.randrange(ranks))
        time.sleep(0.02)
    ended = process.poll() is not None
    left = end_session(process, run.folder, grace_s=15 if ended else 0)
    run.new_steps()
    exit_code = run.outcome()["exit_code"]
    wanted = {"KILL": (1,), "STOP": (1,), "nothing": (0,), "flipped byte": (0,)}.get(fault, (0, 75))
    if not ended or left or (exit_code not in wanted and struck):
        failures.append(f"{what}: ended {ended}, processes left {left}, {run.outcome()}")
    print(f"{what}: step {max(run.losses, default=0)}, exit code {exit_code}", file=sys.stderr, flush=True)
    return struck, first_step


def strike(run: Run, launcher: int, fault: str, victim: int) -> None:
    if fault == "flipped byte":
        flip_a_byte(run.folder)
        return
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            is_rank = "python" in process.name() and "train" in process.cmdline()
            if is_rank and process.environ().get("HOROVOD_RANK") == str(victim):
                process.send_signal(getattr(signal, f"SIG{fault}"))
        except psutil.NoSuchProcess:
            continue


def flip_a_byte(run_dir: Path) -> None:
    """In the middle of the newest checkpoint, if it is not the only one."""
    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    if len(folders) > 1:
        with open(folders[-1] / "model.safetensors", "r+b") as file:
            middle = file.seek(0, os.SEEK_END) // 2
            file.seek(middle)
            (byte,) = file.read(1)
            file.seek(middle)
            file.write(bytes([byte ^ 1]))


def end_session(launcher: subprocess.Popen, run_dir: Path, grace_s: float) -> list[str]:
    """Wait until all are gone that share the launcher's session, or train in `run_dir`; end and return
    those that are not.
    """

    def in_session(process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == launcher.pid or launcher.pid == process.pid
        except OSError:
            return False

    own = {process for process in psutil.process_iter() if in_session(process)}
    training = {p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in (p.info["cmdline"] or [])}
    _, left = psutil.wait_procs(own | training, timeout=grace_s)
    names = [f"{process.pid} {process.name()}" for process in left]
    for process in left:
        process.kill()
    launcher.wait()
    return names


def audit(run: Run, reference: Run, failures: list[str]) -> dict:
    """Samples and losses of the run's last word on each step, against the order and the reference."""
    steps = max(run.losses)
    if sorted(run.losses) != list(range(1, steps + 1)):
        failures.append(f"{run.name}: steps missing")
    seen = [run.samples(step) for step in range(1, steps + 1)]
    stream = [index for step in seen for index in step]
    lost = twice = 0
    for start in range(0, len(stream) - IMAGES + 1, IMAGES):
        counts = Counter(stream[start : start + IMAGES])
        lost += IMAGES - len(counts)
        twice += sum(number - 1 for number in counts.values())
    off = max(abs(run.losses[s] - reference.losses[s]) / abs(reference.losses[s]) for s in run.losses)
    if lost or twice or len(stream) != steps * GLOBAL_BATCH or off > TOLERANCE[run.name]:
        failures.append(f"{run.name}: {lost} samples lost, {twice} twice, losses off by {off:.1e}")
    return {
        "jobs": run.jobs, "steps": steps, "epochs": len(stream) // IMAGES, "samples_lost": lost,
        "samples_twice": twice, "losses_off_by": off,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of faults; the reference runs come after"
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument(
        "--folder", type=Path, help="for data, runs and logs; kept (default: a temporary one)"
    )
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        report = soak(args.folder or Path(temporary), random.Random(args.seed), 60 * args.minutes)
    print(json.dumps({"seed": args.seed, **report}, indent=1))
    sys.exit(bool(report["failures"]))


def soak(folder: Path, chance: random.Random, seconds: float) -> dict:
    data, failures, faults, recovered_s = folder / "data", [], Counter(), []
    make = [sys.executable, "-m", "horovod_owt", "data", "synth", str(data), "--classes", "2"]
    subprocess.run([*make, "--train-per-class", str(IMAGES // 2), "--val-per-class", "13"], check=True)
    runs = {name: Run(name, folder, data) for name in SHAPES}
    struck_at: dict[str, float | None] = dict.fromkeys(runs)
    end = time.monotonic() + seconds
    for name, fault in plan(runs, chance, end):
        waited_since = struck_at[name]
        began = time.monotonic()
        struck, first_step = do_job(runs[name], chance, fault, failures)
        if waited_since and first_step:  # not the time that the other run took in between
            recovered_s.append(waited_since + first_step - began)
        faults[fault] += struck is not None
        struck_at[name] = time.monotonic() - struck if struck and fault != "flipped byte" else None
    result = {}
    for name, run in runs.items():
        if run.losses:
            reference = Run(f"{name}-reference", folder, data)
            reference.launch(2, "data", max(run.losses)).wait()
            reference.new_steps()
            result[name] = audit(run, reference, failures)
        for path in (run.folder / "checkpoints").glob(".*.partial"):
            failures.append(f"left behind: {path}")
    return {
        "faults": dict(faults), "faults_injected": sum(faults.values()), "runs": result,
        "recover_s": {"worst": max(recovered_s, default=0), "median": median(recovered_s)},
        "failures": failures,
    }  # fmt: skip


def plan(runs: dict[str, Run], chance: random.Random, end: float) -> Iterator[tuple[str, str]]:
    """A run, and what is to happen to its next job; at the end nothing, so that each gets over its last."""
    while time.monotonic() < end:
        yield chance.choice(list(runs)), chance.choice(FAULTS)
    yield from ((name, "nothing") for name, run in runs.items() if run.losses)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


if __name__ == "__main__":
    main()
