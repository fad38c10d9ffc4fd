"""owt with hidden layers of 98 units: all it does, with checkpoints of 27 not 490 MB."""

from horovod_owt.cli import main
from horovod_owt.model import alexnet_owt
from horovod_owt.perf import network, traffic

alexnet_owt.HIDDEN = network.HIDDEN = traffic.HIDDEN = 98

if __name__ == "__main__":
    main()
