"""How long many ranks take to meet through the rendezvous server, as processes without torch.

usage: stub_ranks.py RANKS
"""

import json
import os
import sys
from time import monotonic

from horovod_owt.parallel.gloo import Node, place_environment, store_environment
from horovod_owt.parallel.meeting import meet
from horovod_owt.parallel.store import start_store
from horovod_owt.topology import read_topology

LIMIT_S = 60


def be_rank(nodes: list[Node], rank: int) -> bool:
    """Whether this rank heard all others (rank 0) or rank 0 (the others)."""
    os.environ.update(place_environment(nodes, 0, rank))
    with meet(read_topology(), limit_s=LIMIT_S) as met:
        heard = met.gather(rank, LIMIT_S, "hello")
        everybody = sorted(heard.values()) == list(range(met.size))
        return met.broadcast(everybody, LIMIT_S)


def main(ranks: int) -> None:
    nodes, children, start = [Node("here", ranks)], [], monotonic()
    address, port, stop = start_store(nodes, "127.0.0.1")
    os.environ.update(store_environment(address, port))
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            try:
                os._exit(0 if be_rank(nodes, rank) else 1)
            except BaseException as error:
                print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
                os._exit(2)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    stop()
    print(json.dumps({"met": codes.count(0), "seconds": monotonic() - start}), flush=True)


main(int(sys.argv[1]))
