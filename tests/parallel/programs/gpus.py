"""`owt` on a host with as many Tesla K80 as OWT_TEST_GPUS says, by the word of a driver of its own."""

import os
import socket

from horovod_owt.cli import main
from horovod_owt.parallel import device
from horovod_owt.parallel.gpus import Gpu

device.list_gpus = lambda: [
    Gpu(
        n,
        f"GPU-{n}-{socket.gethostname()}",
        "Tesla K80",
        f"0000:{n:02x}:00.0",
        (3, 7),
        12 << 30,
        "470.256.02",
        "11.4",
    )
    for n in range(int(os.environ["OWT_TEST_GPUS"]))
]
main()
