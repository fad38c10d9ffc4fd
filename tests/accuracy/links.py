"""Train the whole net over slow links until it is as accurate as wanted, and compare the time.

usage: python tests/accuracy/links.py [--folder build/accuracy] [--rate 1gbit ...] [--write]

Two hosts of one rank each, from launch/two-hosts, which needs root. What is done is kept, so that a second
start continues; the table goes to docs/compression.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from accuracy import images  # noqa: E402
from accuracy.table import put_between  # noqa: E402
from horovod_owt.files import write_text  # noqa: E402
from horovod_owt.runs.records import METRICS, time_of  # noqa: E402

RATES = ("1gbit", "100mbit")
WANTED = 90  # top-1 in percent
COMMON = ("image_size=64", "batch=32", "epochs=4", "decode_threads=1", "log_every=1000", "tensorboard=never")
WAYS = {
    "hybrid": ("parallel=hybrid", "fc_group_size=all"),
    "data, powersgd:4": ("compression=powersgd:4",),
    "data, onebit": ("compression=onebit",),
    "data, fp16": ("compression=fp16",),
}
PAGE = ROOT / "docs" / "compression.md"
BEGIN, END = "<!-- links: written by tests/accuracy/links.py -->", "<!-- /links -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/accuracy"), help="data and results")
    parser.add_argument("--rate", action="append", help="only this link speed; may be repeated")
    parser.add_argument("--write", action="store_true", help="write the table of what is done, train nothing")
    args = parser.parse_args()
    for rate in () if args.write else args.rate or RATES:
        for way in WAYS:
            if not run_dir(args.folder, rate, way).with_suffix(".done").exists():
                train(args.folder, rate, way)
    put_between(PAGE, BEGIN, END, table(args.folder))


def run_dir(folder: Path, rate: str, way: str) -> Path:
    return folder / "links" / f"{rate} {way}".replace(", ", "-").replace(":", "").replace(" ", "-")


def train(folder: Path, rate: str, way: str) -> None:
    run = run_dir(folder, rate, way)
    shutil.rmtree(run, ignore_errors=True)  # of a run that was ended
    settings = [word for setting in (*COMMON, *WAYS[way]) for word in ("--set", setting)]
    data = images.make("digits", folder / "data")
    job = ["owt", "train", str(data), "--recipe", "quickstart", "--run-dir", str(run)]
    subprocess.run([str(ROOT / "launch" / "two-hosts"), "--rate", rate, "--", *job, *settings], check=True)
    write_text(run.with_suffix(".done"), "")


def table(folder: Path) -> list[str]:
    until = f"steps until {WANTED} %"
    lines = [
        f"| link | | MB a step | ms a step | {until} | their seconds | seconds in all | top-1 at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate in RATES:
        for way in WAYS:
            if run_dir(folder, rate, way).with_suffix(".done").exists():
                lines.append(f"| {rate} | {way} | {' | '.join(figures(run_dir(folder, rate, way)))} |")
    return lines


def figures(run: Path) -> list[str]:
    """Of a run: bytes, steps until the accuracy is reached, times, and the last accuracy."""
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    median_ms = sorted(step["step_ms"] for step in steps)[len(steps) // 2]
    sent = sum(steps[-1]["bytes_sent"].values()) / 1e6
    reached = next((validation for validation in validations if validation["top1"] >= WANTED), None)
    until = ["-"] * 3
    if reached:
        before = [step for step in steps if step["step"] <= reached["step"]]
        seconds = sum(step["step_ms"] for step in before) / 1e3
        in_all = time_of(reached) - time_of(steps[0]) + steps[0]["step_ms"] / 1e3
        until = [str(len(before)), f"{seconds:.0f}", f"{in_all:.0f}"]
    return [f"{sent:.1f}", f"{median_ms:.0f}", *until, f"{validations[-1]['top1']:.1f}"]


if __name__ == "__main__":
    main()
