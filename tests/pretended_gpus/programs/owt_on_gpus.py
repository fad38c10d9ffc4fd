"""owt with the narrow net, computing on a pretended GPU."""

import torch
from kernels_on_cpu import KernelsOnCpu
from narrow import main

torch.backends.cudnn.enabled = False  # its operators have no CPU kernels

with KernelsOnCpu():
    main()
