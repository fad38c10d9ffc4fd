"""train_random.py's runs on pretended GPUs, or on the CPU: usage as there."""

import json
import sys
from pathlib import Path

import torch
from kernels_on_cpu import KernelsOnCpu
from safetensors.torch import save_file
from train_random import HIDDEN, configure, train

from horovod_owt.model import alexnet_owt
from horovod_owt.parallel import runtime
from horovod_owt.parallel.device import claim_device
from horovod_owt.topology import read_topology

torch.backends.cudnn.enabled = False  # its operators have no CPU kernels


def main() -> None:
    out, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    alexnet_owt.HIDDEN = HIDDEN
    topology = read_topology()
    world = runtime.init(claim_device(topology), fc_group_size=min(2, topology.world_size))
    for run in runs:
        whole, record = train(configure(run["settings"]), run["steps"], world, evaluate=run["evaluate"])
        if world.is_root:
            record["device"] = str(world.device)
            save_file(
                {name: value.cpu() for name, value in whole.items()}, out / f"{run['name']}.safetensors"
            )
            (out / f"{run['name']}.json").write_text(json.dumps(record))
    runtime.shutdown()


with KernelsOnCpu():
    main()
