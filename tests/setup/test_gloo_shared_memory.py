"""Sums through shared memory, of real ranks: patch gloo-shared-memory."""

import os
import re
import subprocess

import pytest

# The order of additions does not matter, as two ranks have only one and three add whole numbers: all results
# must have the bits of TCP's.
SUMS = """
import hashlib, os
from pathlib import Path
import torch, horovod.torch as hvd

def segments():
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/horovod-" in line]

def sums(group, factor):
    torch.manual_seed(hvd.rank())
    for kind in (torch.float32, torch.float64, torch.float16, torch.int32):
        width = torch.ones(1, dtype=kind).element_size()
        for size in (1000, 1 << 18, (1 << 20) + 1, 5_000_003):
            values = (factor * torch.randint(0, 500, (size // width,))).to(kind)
            before = values.clone()
            yield hvd.allreduce(values, op=hvd.Sum, process_set=group)
            yield hvd.allreduce(values, op=hvd.Max, process_set=group)
            assert torch.equal(values, before)
            yield hvd.allreduce_(values, op=hvd.Sum, process_set=group)
    several = [factor * torch.arange(n) for n in (100_001, 3, 300_007)]
    yield from hvd.grouped_allreduce(several, op=hvd.Sum, process_set=group)

os.environ["HOROVOD_GLOO_SHARED_MEMORY"] = allowed
pair = hvd.ProcessSet([0, 1])
hvd.init(process_sets=[pair])
digest = hashlib.sha256()
for group, factor in ((hvd.global_process_set, 1), (pair, 1 / 3)):
    if group.included():
        for result in sums(group, factor):
            digest.update(result.numpy().tobytes())
assert len(segments()) == expected, segments()
assert all("(deleted)" in segment for segment in segments()), segments()
hvd.barrier()  # the first rank to leave ends Horovod for the others
hvd.shutdown()
assert not segments()
print("bits", rank, digest.hexdigest(), flush=True)
"""
# no rank may use shared memory, one may, all may: what each sets, and the segments that it then has
ALLOWED = ["'0', 0", "str(rank % 2), 0", "'1', 2 if rank < 2 else 1"]


def test_sums_through_shared_memory_have_the_bits_of_those_over_tcp(ranks):
    """In a job for each: to start Horovod again in one, it needs another rendezvous."""
    found = []
    for allowed in ALLOWED:
        begin = f"import os\nrank = int(os.environ['HOROVOD_RANK'])\nallowed, expected = {allowed}\n"
        said = ranks(3, begin + SUMS).stdout.read()
        found.append(sorted(re.findall(r"bits (\d) (\w+)", said)))
        assert len(found[-1]) == 3, said
    assert found[0] == found[1] == found[2]


LOST = """
import os, signal, threading
from pathlib import Path
import torch, horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
hvd.init()
values = torch.ones(10_000_000)
hvd.allreduce_(values, op=hvd.Max, name="sum")
assert "/dev/shm/horovod-" in Path("/proc/self/maps").read_text()
if hvd.rank() == 1:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
try:
    while True:
        hvd.allreduce_(values, op=hvd.Max, name="sum")
except HorovodInternalError:
    print("told", flush=True)
"""


def test_a_rank_that_is_killed_within_a_sum_is_an_error_for_the_others(ranks):
    assert "told" in ranks(2, LOST).stdout.read()


FULL = """
from pathlib import Path
import torch, horovod.torch as hvd
hvd.init()
print("sum:", hvd.allreduce(torch.ones(1_000_000), op=hvd.Sum, name="sum").sum().item(), flush=True)
assert "/dev/shm/horovod-" not in Path("/proc/self/maps").read_text()
assert not list(Path("/dev/shm").glob("horovod-*"))
hvd.barrier()
"""


@pytest.fixture
def with_little_shared_memory() -> tuple[str, ...]:
    words = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh")
    if os.getuid() != 0 or subprocess.run([*words, "true"], capture_output=True).returncode != 0:
        pytest.skip("another /dev/shm needs root and unshare")
    return words


def test_with_little_shared_memory_sums_go_over_tcp(ranks, with_little_shared_memory):
    job = ranks(2, FULL, under=with_little_shared_memory, HOROVOD_LOG_LEVEL="debug")
    said = job.stdout.read()
    assert job.wait(20) == 0 and said.count("sum: 2000000.0") == 2, said
    assert "Large allreduces go through TCP; here: No space left on device" in said
