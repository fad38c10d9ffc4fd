"""`owt bench input`: pipelines side by side, on the user's images."""

import pytest
from real_ranks import OWT, SMALL

COMMAND = [*OWT, "bench", "input"]
TINY = ["--set", "batch=32", "--set", "decode_threads=1", "--blocks", "2", "--batches", "8"]


@pytest.mark.alone
def test_bench_input_prints_one_json_document(run, images):
    report = run([*COMMAND, images, *SMALL, *TINY, "--json"], launcher="none").json()
    rows = {row["pipeline"]: row for row in report["rows"]}
    assert [name for name in rows if name != "spdl"] == [
        *("dali", "dali-file-reader", "torchvision", "decoding-only", "cached")
    ]
    for row in rows.values():
        low, high = row["images_per_s_quartiles"]
        assert 0 < low <= row["images_per_s"] <= high
        # CPU seconds for one of wall: of one decoding thread or worker, and of what hands over
        assert 0.2 < row["cpu_s_per_image"] * row["images_per_s"] < 2.5
    assert report["ratios"]["dali/torchvision"] == pytest.approx(
        rows["dali"]["images_per_s"] / rows["torchvision"]["images_per_s"]
    )
    assert report["method"]["training_images"] == 96 and report["method"]["threads_or_workers"] == 1


def test_bench_input_under_a_launcher_is_refused_in_one_line(run, images):
    ranks = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"}
    done = run([*COMMAND, images], launcher="none", exit_code=2, **ranks)
    (line,) = [line for line in done.stderr.splitlines() if "owt:" in line]
    assert "under a launcher; wanted one process" in line
