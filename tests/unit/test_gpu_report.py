"""The report of a GPU machine."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from gpu_report import GpuReport  # noqa: E402


def test_one_gpu_does_not_show_what_needs_several(tmp_path):
    report = GpuReport(machine={"gpus": 1, "gpu": "NVIDIA H100"})
    report.results = {"test_a": "passed", "test_b": "failed", "test_c": "skipped: no NCCL"}
    report.add_row("a step", batch=128, ms=1.23456)
    report.add_row("a step", batch=256, note="slow")
    report.write(tmp_path)
    text, content = ((tmp_path / f"gpu-report.{kind}").read_text() for kind in ("md", "json"))
    assert "1 passed, 1 failed" in text and "| 128 | 1.235 |  |" in text and "| 256 |  | slow |" in text
    for missing in ("NVLink", "MIG instances", "several hosts", "test_c: skipped: no NCCL"):
        assert missing in text.partition("## Not shown")[2]
    assert json.loads(content)["tables"]["a step"][0]["ms"] == 1.23456


def test_several_gpus_show_more():
    assert not any("NVLink" in line for line in GpuReport(machine={"gpus": 8}).not_shown())
