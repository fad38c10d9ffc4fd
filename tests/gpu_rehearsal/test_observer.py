"""The rehearsal sees what it is to see: each fault is put in on purpose."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from preload import under_pretended_cuda
under_pretended_cuda()
import horovod.torch as hvd, pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from collectives import Collectives, Refused
from observer import GPU, Observer, patch_torch

def found(words, act):
    with pytest.raises((Refused, RuntimeError), match=words):
        act()

collectives = Collectives(2)
observer = Observer(collectives)
group = type("Set", (), dict(ranks=[0, 1]))
with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), observer:
    patch_torch(observer, patch)
    flat = torch.zeros(8, device=GPU)
    handle = collectives.allreduce_async_(flat[:4], name="a", process_set=group)
    flat[4:].add_(1)
    found("what a is summing", lambda: flat[3:5].add_(1))
    found("what a is summing", lambda: flat[:1] * 2)
    found("in flight already", lambda: collectives.allreduce_async_(flat[4:], name="a", process_set=group))
    collectives.synchronize(handle)
    flat.add_(1)
    handle = collectives.allgather_async(flat, name="b", process_set=group)
    flat * 2
    found("writes what b is sending", lambda: flat.add_(1))
    collectives.synchronize(handle)
    found("device", lambda: flat + torch.zeros(8))
    found("pinned", flat.pin_memory)
    found("of the host", flat.numpy)
    found("bfloat16", lambda: collectives.allreduce_async(flat.bfloat16(), name="c", process_set=group))
    transposed = flat.view(2, 4).t()
    found("not contiguous", lambda: collectives.allgather_async(transposed, name="c", process_set=group))
    seen = observer.seen
    seen.clear()
    flat[0].item(), flat.cpu(), flat.tolist(), torch.cuda.synchronize(), torch.cuda.Event().synchronize()
    assert sum(seen.host_syncs.values()) == 5, seen
    flat.new_tensor([1.0]), torch.tensor([1.0], device=GPU), torch.zeros(3).to(GPU)
    assert sum(seen.blocking_copies.values()) == 3 and sum(seen.pageable_copies.values()) == 1, seen
    torch.zeros(3).pin_memory().to(GPU, non_blocking=True)
    torch.empty(3, pin_memory=True).to(GPU, non_blocking=True)
    assert sum(seen.blocking_copies.values()) == 3 and sum(seen.pageable_copies.values()) == 1, seen
    seen.clear()
    flat.view(2, 4).t()[0].detach(), flat * 2, torch.zeros(3) + 1
    assert sum(seen.kernels.values()) == 1, seen
print("all seen")
"""


@pytest.mark.timeout(200)
def test_faults_put_in_on_purpose_are_seen(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0 and "all seen" in done.stdout, done.stderr[-3000:]
