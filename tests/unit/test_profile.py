"""A profile of some steps: the trace, the table, and neither without being asked."""

import gzip
import json
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.profiler import DeviceType

from horovod_owt.parallel.activity import now
from horovod_owt.parallel.runtime import World
from horovod_owt.train.profile import OPERATIONS, SKIP, Profile, table_of

WORLD = World(0, 1, 0, 1, "node1", torch.device("cpu"), 1)


def run(profile: Profile, steps: int) -> None:
    with profile:
        for _ in range(steps):
            with now.phase("reading images"):
                x = torch.rand(8, 8)
            torch.mm(x, x)
            profile.step()


def test_a_trace_of_the_steps_and_a_table(tmp_path, caplog):
    caplog.set_level(logging.INFO, "horovod_owt")
    run(Profile(3, WORLD, tmp_path), SKIP + 10)
    with gzip.open(tmp_path / "profile" / "rank-0000.json.gz") as file:
        events = json.load(file)["traceEvents"]
    spans = [event["name"] for event in events if event.get("ph") == "X"]
    assert len({name for name in spans if name.startswith("ProfilerStep#")}) == 3
    assert spans.count("aten::mm") == 3 and "reading images" in spans
    table = (tmp_path / "profile" / "rank-0000.txt").read_text()
    assert "aten::mm" in table and "ProfilerStep" not in table and table.rstrip() in caplog.text
    assert now.annotate is nullcontext


def test_a_run_that_ends_early_has_what_there_was_or_a_warning(tmp_path, caplog):
    run(Profile(100, WORLD, tmp_path / "a"), 2)
    assert "no profile" in caplog.text and not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    run(Profile(100, WORLD, tmp_path / "b"), SKIP + 3)
    assert (tmp_path / "b" / "profile" / "rank-0000.json.gz").exists()
    assert now.annotate is nullcontext


def test_a_folder_that_is_read_only_costs_the_profile_only(tmp_path, caplog):
    run(Profile(1, WORLD, tmp_path / "missing"), SKIP + 4)
    assert "no profile of this rank" in caplog.text


def test_nothing_is_done_unless_it_is_asked_for(tmp_path):
    profile = Profile(0, WORLD, tmp_path)
    with profile:
        assert profile._profiler is None and now.annotate is nullcontext
        profile.step()
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_the_dearest_by_their_own_time_and_pieces_are_added_up():
    operations = [
        SimpleNamespace(key=f"aten::op{n}", self_cpu_time_total=1000.0 * n, count=10) for n in range(20)
    ]
    operations.append(SimpleNamespace(key="ProfilerStep#5", self_cpu_time_total=1e9, count=10))
    operations += [
        SimpleNamespace(key=f"waiting for conv gradients.{n}", self_cpu_time_total=10_000.0, count=10)
        for n in range(4)
    ]
    heading, first, second, *rest = table_of(operations, steps=10, on_gpu=False).splitlines()
    assert first.split(maxsplit=3) == ["17.4%", "4.00", "4.0", "waiting for conv gradients"]
    assert second.endswith("aten::op19") and len(rest) == OPERATIONS - 2


def test_the_table_of_a_gpu_has_each_kernel_once():
    """torch lists its time with the operation that launched it too, and an annotation's on both sides."""

    def event(key: str, us: float, on: DeviceType) -> SimpleNamespace:
        return SimpleNamespace(key=key, self_device_time_total=us, device_type=on, count=10)

    kernel = "void cutlass::Kernel2<" + "x" * 200
    operations = [event("aten::mm", 3000.0, DeviceType.CPU), event(kernel, 3000.0, DeviceType.CUDA)]
    operations.append(event("ncclDevKernel_AllReduce_Sum_f32", 1000.0, DeviceType.CUDA))  # Horovod's thread's
    for annotation in ("waiting for step facts", "ProfilerStep#5"):
        operations += [event(annotation, us, on) for us, on in ((0, DeviceType.CPU), (1e9, DeviceType.CUDA))]
    _, first, second = table_of(operations, steps=10, on_gpu=True).splitlines()
    assert first.split(maxsplit=3) == ["75.0%", "0.30", "1.0", kernel[:100]]
    assert second.split() == ["25.0%", "0.10", "1.0", "ncclDevKernel_AllReduce_Sum_f32"]
