"""The pretended GPUs by themselves: devices, memory, streams; and a net that computes there as on the CPU."""

import torch
from kernels_on_cpu import KernelsOnCpu
from torch import nn

torch.backends.cudnn.enabled = False


def check_devices() -> None:
    assert torch.cuda.device_count() == 4
    assert [torch.cuda.get_device_properties(i).pci_bus_id for i in range(4)] == [1, 2, 3, 4]
    assert torch.cuda.get_device_capability() == (9, 0)


def check_memory() -> None:
    pinned = torch.arange(6.0).pin_memory()
    assert pinned.is_pinned() and not torch.arange(6.0).is_pinned()
    there = pinned.to("cuda:1", non_blocking=True)
    assert there.device == torch.device("cuda:1") and there.cpu().tolist() == [0, 1, 2, 3, 4, 5]


def check_kernels_are_refused() -> None:
    """A forgotten kernel must not pass for a result."""
    try:
        torch.ones(3).cuda() + 1
    except RuntimeError:
        return
    raise AssertionError("a kernel ran")


def check_streams() -> None:
    side, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(side):
        event.record()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.synchronize()
    assert event.query()


def trained(device: str) -> list[torch.Tensor]:
    """A small net with what AlexNet has, after three steps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(392, 10)
    )
    net = net.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    for step in range(3):
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), torch.arange(4).to(device)).backward()
        optimizer.step()
    return [*net.state_dict().values()]


check_devices()
check_memory()
check_kernels_are_refused()
check_streams()
with KernelsOnCpu():
    there = trained("cuda")
    assert all(value.is_cuda for value in there)
    there = [value.cpu() for value in there]
for one, other in zip(there, trained("cpu"), strict=True):
    torch.testing.assert_close(one, other, rtol=0, atol=0)
