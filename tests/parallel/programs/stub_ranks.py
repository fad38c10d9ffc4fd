"""How long many ranks take at the rendezvous server, as processes without torch.

usage: stub_ranks.py meet|gloo RANKS

meet: they meet rank 0, as for a preflight. gloo: they ask for each other's addresses, as Gloo does.
"""

import json
import os
import socket
import sys
from time import monotonic, sleep

from horovod_owt.parallel.control_channel import open_control_channel
from horovod_owt.parallel.gloo import Node, rank_environment, rendezvous_environment
from horovod_owt.parallel.store import start_rendezvous
from horovod_owt.topology import read_topology

LIMIT_S = 60
ADDRESS_BYTES = 136  # of a Gloo pair


def be_rank(nodes: list[Node], rank: int) -> bool:
    """Whether this rank heard all others (rank 0) or rank 0 (the others)."""
    os.environ.update(rank_environment(nodes, 0, rank))
    with open_control_channel(read_topology(), limit_s=LIMIT_S) as met:
        heard = met.gather(rank, LIMIT_S, "hello")
        everybody = sorted(heard.values()) == list(range(met.size))
        return met.broadcast(everybody, LIMIT_S)


def connect_as_gloo(nodes: list[Node], rank: int) -> bool:
    """The requests of gloo::rendezvous::Context::connectFullMesh, a connection for each."""
    ranks = nodes[0].ranks
    addresses = bytes(ADDRESS_BYTES * (ranks - 1))
    ask("PUT", f"rank_{rank}", b"here")
    for other in range(rank):
        ask("GET", f"rank_{other}")
    ask("PUT", str(rank), addresses)
    for other in set(range(ranks)) - {rank}:
        while not ask("GET", str(other)):
            sleep(0.01)
        if ask("GET", str(other)) != addresses:
            return False
    return True


def ask(method: str, key: str, value: bytes = b"") -> bytes:
    """A key's value, as Horovod's client in C++ asks for it; empty if there is none yet."""
    place, secret = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"].split("/")
    ip, port = place.split(":")
    length = f"Host: {ip}\r\nContent-Length: {len(value)}"
    head = f"{method} /{secret}:{port}/global/{key} HTTP/1.1\r\n{length}\r\n\r\n"
    with socket.socket() as connection:
        connection.connect((ip, int(port)))
        connection.sendall(head.encode() + value)
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).partition(b"\r\n\r\n")[2]


def main(what: str, ranks: int) -> None:
    act = {"meet": be_rank, "gloo": connect_as_gloo}[what]
    nodes, children, start = [Node("here", ranks)], [], monotonic()
    address, port, stop = start_rendezvous(nodes, "127.0.0.1")
    os.environ.update(rendezvous_environment(address, port))
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            try:
                os._exit(0 if act(nodes, rank) else 1)
            except BaseException as error:
                print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
                os._exit(2)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    stop()
    print(json.dumps({"met": codes.count(0), "seconds": monotonic() - start}), flush=True)


main(sys.argv[1], int(sys.argv[2]))
